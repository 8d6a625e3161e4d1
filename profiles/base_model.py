"""What crumb knows of a base model before it is loaded: kind, precision, prediction type, size, fingerprint.

Separate from the loader because the wizard needs it too, and has no torch. Only headers and small JSON files are
read; `fingerprint` alone reads the whole model, once.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from crumb.profiles.errors import RequestError
from crumb.profiles.model_kind import SDXL, kind_of_file, unet_variant
from crumb.profiles.paths import cache_dir
from crumb.profiles.safetensors_header import PICKLE_SUFFIXES, num_elements, pickle_reason, read_header

__all__ = [
    "BaseModel", "check_vae", "fingerprint", "hints_v_prediction", "inspect_base_model", "read_header", "weight_files",
]  # fmt: skip

UNET_PREFIX = "model.diffusion_model."
DTYPES = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
SDXL_RESOLUTION = 1024
# A latent pixel is 8 image pixels wide.
VAE_SCALE = 8
NEEDED_PARTS = ("unet", "text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class BaseModel:
    path: Path
    layout: str  # "single_file" or "diffusers"
    dtype: str  # of the U-Net: "fp32", "fp16" or "bf16"
    prediction_type: str | None  # "epsilon", "v_prediction", or None where the file does not say
    prediction_evidence: str
    zero_terminal_snr: bool
    has_vae: bool
    num_unet_parameters: int
    native_resolution: int  # pixels a side


def inspect_base_model(path: Path | str) -> BaseModel:
    """Judges a single .safetensors file or a diffusers folder by headers alone; RequestError unless it is SDXL."""
    path = Path(path).expanduser()
    if not path.exists():
        raise RequestError(
            f"There is no base model at {path}: check the path (a .safetensors file or a diffusers folder)."
        )
    return _inspect_folder(path) if path.is_dir() else _inspect_file(path)


def weight_files(folder: Path, part: str) -> list[Path]:
    """The .safetensors files of one part of a diffusers folder; [] where there are none.

    The plain name goes before the `.fp16` variant, a whole file before shards.
    """
    directory = folder / part
    stem = "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"
    for variant in ("", ".fp16"):
        whole = directory / f"{stem}{variant}.safetensors"
        if whole.is_file():
            return [whole]
        index = directory / f"{stem}.safetensors.index{variant}.json"
        if index.is_file():
            return _shards(index)
    return []


def check_vae(path: Path | str) -> None:
    """RequestError unless the path is a VAE's .safetensors file or a diffusers VAE folder, by header."""
    path = Path(path).expanduser()
    if not path.exists():
        raise RequestError(f"There is no VAE at {path}: check the path (a .safetensors file or a diffusers folder).")
    if path.is_dir():
        if not weight_files(path, "vae") and not weight_files(path, ""):
            raise RequestError(f"{path} holds no VAE weights (diffusion_pytorch_model.safetensors): choose another folder.")
        return
    tensors = read_header(path)[0]
    kind = kind_of_file(tensors)
    if kind != "a VAE":
        raise RequestError(f"{path} is {kind}, not a VAE: choose an SDXL VAE, such as sdxl_vae.safetensors.")
    for name, info in tensors.items():
        if name.endswith("encoder.conv_out.weight") and info["shape"][0] != 8:
            raise RequestError(f"The VAE in {path} has {info['shape'][0] // 2} latent channels and SDXL has 4: choose "
                               f"an SDXL VAE.")


def hints_v_prediction(path: Path | str) -> bool:
    """Whether a file's name says v-pred, as authors write it when they set no mark in the file."""
    return bool(re.search(r"v[-_ ]?pred", Path(path).name, re.IGNORECASE))


def fingerprint(path: Path, on_progress: Callable[[int, int], None] | None = None) -> str:
    """sha256 (hex) of a model's content; of a single file, the sha256 of the file itself.

    Remembered by path, size and time of change, so that a model is read once. `on_progress(done_bytes, total_bytes)`.
    """
    files = _folder_files(path) if path.is_dir() else [path]
    stamp = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    memory = cache_dir() / "fingerprints.json"
    known = _read_json(memory)
    entry = known.get(str(path.resolve()))
    if isinstance(entry, dict) and entry.get("stamp") == stamp:
        return entry["sha256"]
    digest = hashlib.sha256()
    done_bytes, total_bytes = 0, sum(size for _, size, _ in stamp)
    for file in files:
        if path.is_dir():
            digest.update(f"{file.relative_to(path).as_posix()}\0{file.stat().st_size}\0".encode())
        for chunk in _chunks(file):
            digest.update(chunk)
            done_bytes += len(chunk)
            if on_progress:
                on_progress(done_bytes, total_bytes)
    known = _read_json(memory) | {str(path.resolve()): {"stamp": stamp, "sha256": digest.hexdigest()}}
    scratch = memory.with_suffix(f".{os.getpid()}")
    scratch.write_text(json.dumps(known, indent=1))
    scratch.replace(memory)
    return digest.hexdigest()


def _inspect_file(path: Path) -> BaseModel:
    tensors, metadata = read_header(path)
    kind = kind_of_file(tensors)
    if kind != SDXL:
        raise RequestError(_not_sdxl(path, kind))
    unet = {name: info for name, info in tensors.items() if name.startswith(UNET_PREFIX)}
    prediction_type, evidence = _file_prediction(path, tensors, metadata)
    return BaseModel(
        path=path,
        layout="single_file",
        dtype=_dtype(path, unet),
        prediction_type=prediction_type,
        prediction_evidence=evidence,
        zero_terminal_snr="ztsnr" in tensors,
        has_vae="first_stage_model.decoder.conv_in.weight" in tensors,
        num_unet_parameters=sum(num_elements(info) for info in unet.values()),
        native_resolution=_resolution(metadata),
    )


def _inspect_folder(path: Path) -> BaseModel:
    for part in NEEDED_PARTS:
        if not (path / part).is_dir():
            raise RequestError(_not_sdxl(path, _kind_of_folder(path)))
        if not weight_files(path, part):
            pickles = [file for file in sorted((path / part).iterdir()) if file.suffix.lower() in PICKLE_SUFFIXES]
            if pickles:
                raise RequestError(pickle_reason(pickles[0]))
            raise RequestError(f"{path / part} has no .safetensors weights: fetch the whole diffusers folder.")
    unet = {name: info for file in weight_files(path, "unet") for name, info in read_header(file)[0].items()}
    for part in ("text_encoder", "text_encoder_2", "vae"):
        for file in weight_files(path, part):
            read_header(file)
    kind = unet_variant(unet)
    if kind != SDXL:
        raise RequestError(_not_sdxl(path, kind))
    scheduler = _read_json(path / "scheduler/scheduler_config.json")
    prediction_type, evidence = _folder_prediction(path, scheduler)
    sample_size = _read_json(path / "unet/config.json").get("sample_size")
    return BaseModel(
        path=path,
        layout="diffusers",
        dtype=_dtype(path, unet),
        prediction_type=prediction_type,
        prediction_evidence=evidence,
        zero_terminal_snr=scheduler.get("rescale_betas_zero_snr") is True,
        has_vae=bool(weight_files(path, "vae")),
        num_unet_parameters=sum(num_elements(info) for info in unet.values()),
        native_resolution=_usable_side(sample_size * VAE_SCALE if isinstance(sample_size, int) else 0),
    )


def _not_sdxl(path: Path, kind: str) -> str:
    what = "is of a kind that crumb does not know" if kind == "unknown" else f"is {kind}"
    return (
        f"{path} {what}, not an SDXL base model. Choose a full SDXL checkpoint (one .safetensors of about 6.9 GB with "
        "U-Net and both text encoders, such as sd_xl_base_1.0 or a fine-tune of it), or a diffusers folder of one."
    )


def _kind_of_folder(path: Path) -> str:
    name = _read_json(path / "model_index.json").get("_class_name")
    if isinstance(name, str) and "XL" not in name:
        return f"a diffusers folder of {name}"
    if (path / "transformer").is_dir():
        return "a diffusers folder of a transformer model (SD3, FLUX or a later one)"
    if (path / "unet").is_dir() and (path / "text_encoder").is_dir():
        return "a diffusers folder of SD 1.5 or SD 2.x (it has no text_encoder_2)"
    if (path / "unet").is_dir() and (path / "text_encoder_2").is_dir():
        return "a diffusers folder of the SDXL refiner (it has no text_encoder)"
    return "a folder, but not a diffusers one (unet/, text_encoder/ and text_encoder_2/ are needed)"


def _dtype(path: Path, unet: dict[str, dict]) -> str:
    counts: dict[str, int] = {}
    for info in unet.values():
        counts[info["dtype"]] = counts.get(info["dtype"], 0) + num_elements(info)
    odd = sorted(counts.keys() - DTYPES.keys())
    if odd:
        raise RequestError(
            f"{path} stores its U-Net as {', '.join(odd)}; training needs F32, F16 or BF16 weights. "
            "Choose the fp16 or bf16 version of this model."
        )
    return DTYPES[max(counts, key=counts.__getitem__)]


def _file_prediction(path: Path, tensors: dict, metadata: dict) -> tuple[str | None, str]:
    if "v_pred" in tensors:
        return "v_prediction", "tensor v_pred in the file"
    mark = metadata.get("modelspec.prediction_type", "").lower()
    if mark:
        evidence = f"metadata modelspec.prediction_type is {mark}"
        return {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}.get(mark), evidence
    return None, _name_hint(path)


def _folder_prediction(path: Path, scheduler: dict) -> tuple[str | None, str]:
    mark = scheduler.get("prediction_type")
    if mark is None:
        return None, _name_hint(path)
    if mark not in ("epsilon", "v_prediction"):
        raise RequestError(
            f"{path}/scheduler/scheduler_config.json has prediction_type {mark!r}, and crumb trains models of "
            "epsilon or v_prediction: choose another base model."
        )
    return mark, "prediction_type in scheduler/scheduler_config.json"


def _name_hint(path: Path) -> str:
    return "file name hints v-prediction" if hints_v_prediction(path) else "no mark in the file"


def _resolution(metadata: dict) -> int:
    """The side of a square with the area that the metadata name."""
    match = re.fullmatch(r"\s*(\d{2,5})\s*x\s*(\d{2,5})\s*", metadata.get("modelspec.resolution", ""))
    return _usable_side((int(match[1]) * int(match[2])) ** 0.5 if match else 0)


def _usable_side(side: float) -> int:
    """The nearest multiple of 64; SDXL's own side for what no plan would take."""
    nearest = round(side / 64) * 64
    return nearest if 64 <= nearest <= 2048 else SDXL_RESOLUTION


def _shards(index: Path) -> list[Path]:
    names = _read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise RequestError(f"{index} is not a sound index of weight files: fetch it again.")
    # The name alone is taken, so that an index cannot point outside its folder.
    files = sorted({index.parent / Path(str(name)).name for name in names.values()})
    for file in files:
        if not file.is_file():
            raise RequestError(f"{index} names {file.name}, which is not there: fetch the whole folder.")
    return files


def _folder_files(folder: Path) -> list[Path]:
    """What a diffusers folder (a whole model's, or a VAE's alone) is made of."""
    parts = (*NEEDED_PARTS, "vae", "")
    configs = [folder / part / "config.json" for part in parts] + [folder / "scheduler/scheduler_config.json"]
    weights = [file for part in parts for file in weight_files(folder, part)]
    return sorted(file for file in configs + weights if file.is_file())


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(8 * 1024**2):
            yield chunk


def _read_json(path: Path) -> dict:
    """{} where the file is missing or is not a JSON object."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
