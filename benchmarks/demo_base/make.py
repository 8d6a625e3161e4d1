"""Makes the demo's base model and picture sets from the registry's packages: `python -P benchmarks/demo_base/make.py`.

Every part resumes from what WORK holds, so a stopped run goes on by the same command.
"""

import argparse
import hashlib
import sys
from pathlib import Path

import torch

# `python -P` leaves this folder off the path, which keeps the project's own `kernels` from hiding another package.
sys.path.insert(0, str(Path(__file__).parent))

from autoencoder import encode_base_pictures, folded_autoencoder, train_autoencoder
from denoiser import train_denoiser
from pack import pack_base, pack_sets
from pictures import BASE_SET_SHA256, digest, load_base_set

from crumb.engine.model.load import load_vae
from crumb.engine.run.demo import expanded
from crumb.profiles.base_model import inspect_base_model
from crumb.profiles.safetensors_header import read_header

ENGINE = Path(__file__).parents[2] / "engine"
DENOISER_STEPS = 9000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("demo-base"), help="folder for states and logs")
    parser.add_argument("--demo", type=Path, default=ENGINE / "demo", help="folder for the results")
    parser.add_argument("--denoiser-steps", type=int, default=DENOISER_STEPS)
    parser.add_argument("--start", type=Path, help="an SDXL file of this recipe to go on from, its autoencoder as it is")
    options = parser.parse_args()
    if options.start and options.start.absolute().parent == options.demo.absolute():
        sys.exit(f"--start {options.start} would be written over. Name another folder for the results with --demo.")
    options.work.mkdir(parents=True, exist_ok=True)
    options.demo.mkdir(parents=True, exist_ok=True)
    _check_work(options.work, options.start)
    start = options.start and _whole(options.start, options.work)
    if start:
        autoencoder = load_vae(inspect_base_model(start), None, torch.float32)
    else:
        train_autoencoder(options.work)
        autoencoder = folded_autoencoder(options.work)
    if not (options.work / "latents.npy").exists():
        encode_base_pictures(options.work, autoencoder)
    train_denoiser(options.work, options.denoiser_steps, start)
    pack_base(options.work, autoencoder, options.demo / "base.safetensors")
    pack_sets(options.work, options.demo)


def _check_work(work: Path, start: Path | None) -> None:
    """A folder's states belong to one beginning: latents of one autoencoder must not meet another."""
    begins = hashlib.sha256(start.read_bytes()).hexdigest() if start else "from nothing"
    note = work / "begins.txt"
    if not note.exists():
        note.write_text(begins)
    if note.read_text() != begins:
        sys.exit(f"{work} holds the states of another beginning ({note.read_text()[:12]}). Name another folder with --work.")
    keys, pictures = load_base_set(work)
    if not digest(keys, pictures).startswith(BASE_SET_SHA256):
        print("The pictures are not those of the packaged base, byte for byte: another renderer or package.", file=sys.stderr)


def _whole(path: Path, work: Path) -> Path:
    """The SDXL file that a packed one stands for."""
    tensors, metadata = read_header(path)
    if "token_rows" not in tensors:
        return path
    whole = work / "start.safetensors"
    whole.write_bytes(expanded(path.read_bytes(), tensors, metadata))
    return whole


if __name__ == "__main__":
    main()
