"""Does a LoRA file load everywhere? Reads the file back, by its bytes alone, and says what each program will find.

Torch-free, and blind to how the file was written: keys are compared with SDXL's own module list, shapes with
each other, values with what a float can be. Run as `python -P -m crumb.engine.network.verify FILE [--json]`.
"""

import json
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path

import numpy as np

from crumb.engine.model.keys import lora_stem
from crumb.profiles.blocks import block_of
from crumb.profiles.errors import CrumbError
from crumb.profiles.safetensors_header import read_header

TENSORS = ("alpha", "lora_down.weight", "lora_up.weight")
READABLE = {"F16": np.float16, "F32": np.float32, "F64": np.float64, "BF16": None}
CONTEXT_WIDTH = 2048
"""What SDXL's cross-attention keys and values read; smaller models have another."""
ATTENTION_BLOCKS = {
    "down_blocks.1": (2, 2), "down_blocks.2": (2, 10), "mid_block": (1, 10), "up_blocks.0": (3, 10), "up_blocks.1": (3, 2),
}
"""Attention modules of SDXL's U-Net by block: (how many, transformer depth)."""
RESNETS = {"down_blocks.0": 2, "down_blocks.1": 2, "down_blocks.2": 2, "mid_block": 2, "up_blocks.0": 3, "up_blocks.1": 3,
           "up_blocks.2": 3}
TEXT_ENCODER_LAYERS = {"lora_te1": 12, "lora_te2": 32}


@dataclass
class Report:
    """What `crumb verify` says. `ok` is False when some program would drop part of the file or render nonsense."""

    path: str
    ok: bool = True
    num_modules: int = 0
    num_matched: int = 0
    unmatched_keys: list[str] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    alphas: list[float] = field(default_factory=list)
    dtype: str = ""
    file_bytes: int = 0
    attention_alphas: dict[str, float] = field(default_factory=dict)
    block_norms: dict[str, float] = field(default_factory=dict)
    """Frobenius norm of alpha/rank * up @ down over all modules of a block."""
    problems: list[str] = field(default_factory=list)
    full_size: bool = True
    """False where the widths are not those of SDXL itself but of a smaller or pruned model."""
    metadata: dict[str, str] = field(default_factory=dict)


def verify_lora(path: Path) -> Report:
    """The report on one file; RequestError when it is no safetensors file at all."""
    tensors, metadata = read_header(path)
    report = Report(path=str(path), file_bytes=path.stat().st_size, metadata=metadata)
    report.dtype = "/".join(sorted({info["dtype"] for info in tensors.values()}))
    modules = defaultdict(dict)
    for key in tensors:
        stem, _, kind = key.partition(".")
        if kind in TENSORS and stem in known_stems():
            modules[stem][kind] = key
        else:
            report.unmatched_keys.append(key)
    report.num_modules = len({key.partition(".")[0] for key in tensors})
    report.num_matched = len(modules)
    squares = defaultdict(float)
    data = np.memmap(path, dtype=np.uint8, mode="r")
    for stem, keys in modules.items():
        missing = [kind for kind in TENSORS if kind not in keys]
        if missing:
            report.problems.append(f"{stem} lacks {', '.join(missing)}")
            continue
        unreadable = [tensors[key]["dtype"] for key in keys.values() if tensors[key]["dtype"] not in READABLE]
        if unreadable:
            report.problems.append(f"{stem} is stored as {unreadable[0]}, which LoRA loaders don't read")
            continue
        _check_module(report, squares, stem, *(read_tensor(data, tensors[keys[kind]]) for kind in TENSORS))
    report.block_norms = {block: round(float(np.sqrt(square)), 6) for block, square in sorted(squares.items())}
    _check_whole(report, modules)
    report.ok = not report.problems
    return report


def read_tensor(data: np.ndarray, info: dict) -> np.ndarray:
    """One tensor as float32 from the file's bytes; bf16 is the upper half of a float32."""
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    begin, end = (start + offset for offset in info["data_offsets"])
    raw = data[begin:end].tobytes()
    if info["dtype"] == "BF16":
        values = (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        values = np.frombuffer(raw, READABLE[info["dtype"]])
    return values.astype(np.float32).reshape(info["shape"])


def known_stems() -> frozenset[str]:
    """Every module of SDXL that kohya's LoRA and LoCon know: 788 in the U-Net, 72 and 192 in the text encoders."""
    if not _stems:
        _stems.update(map(lora_stem, unet_modules()))
        projections = [f"self_attn_{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")] + ["mlp_fc1", "mlp_fc2"]
        for prefix, num_layers in TEXT_ENCODER_LAYERS.items():
            _stems.update(f"{prefix}_text_model_encoder_layers_{layer}_{name}"
                          for layer, name in product(range(num_layers), projections))
    return frozenset(_stems)


_stems: set[str] = set()


def unet_modules():
    """Diffusers names, by rule."""
    for block, (num_attentions, depth) in ATTENTION_BLOCKS.items():
        for attention in range(num_attentions):
            yield from (f"{block}.attentions.{attention}.{name}" for name in ("proj_in", "proj_out"))
            for layer in range(depth):
                inner = [f"attn{n}.to_{name}" for n, name in product((1, 2), ("q", "k", "v", "out.0"))]
                inner += ["ff.net.0.proj", "ff.net.2"]
                yield from (f"{block}.attentions.{attention}.transformer_blocks.{layer}.{name}" for name in inner)
    for block, num_resnets in RESNETS.items():
        for resnet in range(num_resnets):
            names = ["conv1", "conv2", "time_emb_proj"]
            changes_width = block.startswith("up_") or (block, resnet) in (("down_blocks.1", 0), ("down_blocks.2", 0))
            yield from (f"{block}.resnets.{resnet}.{name}" for name in names + ["conv_shortcut"] * changes_width)
    yield from (f"down_blocks.{n}.downsamplers.0.conv" for n in (0, 1))
    yield from (f"up_blocks.{n}.upsamplers.0.conv" for n in (0, 1))


def _check_module(report: Report, squares: dict, stem: str, alpha: np.ndarray, down: np.ndarray, up: np.ndarray) -> None:
    rank = down.shape[0] if down.ndim else 0
    if rank == 0:
        report.problems.append(f"{stem} has rank 0")
        return
    if stem.startswith("lora_unet") and stem.endswith(("attn2_to_k", "attn2_to_v")) and down.shape[1] != CONTEXT_WIDTH:
        report.full_size = False
    if alpha.shape != ():
        report.problems.append(f"{stem}.alpha has shape {list(alpha.shape)}; kohya's tools fail unless it is a single number")
    if up.ndim != down.ndim or up.shape[1] != rank or up.shape[2:] not in ((), (1, 1)):
        report.problems.append(f"{stem}: down {list(down.shape)} and up {list(up.shape)} don't fit each other")
        return
    if not (np.isfinite(down).all() and np.isfinite(up).all() and np.isfinite(alpha).all()):
        report.problems.append(f"{stem} holds NaN or infinity")
        return
    alpha_value = float(alpha.reshape(-1)[0])
    group = "unet" if "_attn" in stem and stem.startswith("lora_unet") else stem[:8] if stem.startswith("lora_te") else ""
    if group and report.attention_alphas.setdefault(group, alpha_value) != alpha_value:
        problem = f"alphas differ among the attention modules of {group}: diffusers misreads such a file"
        report.problems += [] if problem in report.problems else [problem]
    flat_down, flat_up = down.reshape(rank, -1).astype(np.float64), up.reshape(up.shape[0], rank).astype(np.float64)
    # ||up @ down||^2 without the large product: trace of two (rank, rank) matrices.
    square = float(np.sum((flat_up.T @ flat_up) * (flat_down @ flat_down.T))) * (alpha_value / rank) ** 2
    squares[block_of(stem) or stem[5:8]] += square
    if rank not in report.ranks:
        report.ranks = sorted([*report.ranks, rank])
    if alpha_value not in report.alphas:
        report.alphas = sorted([*report.alphas, alpha_value])


def _check_whole(report: Report, modules: dict) -> None:
    if report.unmatched_keys:
        report.problems.append(f"{len(report.unmatched_keys)} keys belong to no SDXL module, so programs drop them or refuse "
                               f"the file (first: {report.unmatched_keys[0]})")
    if not report.num_matched:
        report.problems.append("no key belongs to SDXL: this is no SDXL LoRA in kohya's naming")
    elif not any(report.block_norms.values()):
        report.problems.append("every change is zero: this LoRA does nothing")
    if not report.metadata.get("ss_base_model_version", "").startswith("sdxl_"):
        report.problems.append("ss_base_model_version does not start with sdxl_: A1111 hides the file from SDXL models")
    for encoder, num_layers in TEXT_ENCODER_LAYERS.items():
        for layer in range(num_layers):
            names = [f"{encoder}_text_model_encoder_layers_{layer}_self_attn_{p}_proj" for p in ("q", "k", "v", "out")]
            if encoder == "lora_te2" and 0 < sum(name in modules for name in names) < 4:
                report.problems.append(f"{encoder} layer {layer} has only some of q, k, v, out: A1111 then skips them all")


def report_lines(report: Report) -> list[str]:
    lines = [
        f"{report.path}: {report.file_bytes / 2**20:.1f} MiB, {report.dtype}",
        f"modules   {report.num_matched} matched, {len(report.unmatched_keys)} keys unmatched",
        f"rank      {', '.join(map(str, report.ranks))}    alpha {', '.join(f'{alpha:g}' for alpha in report.alphas)}",
        "change    " + "  ".join(f"{block} {norm:.4g}" for block, norm in report.block_norms.items()),
    ]
    for key in ("ss_output_name", "ss_base_model_version", "modelspec.trigger_phrase", "modelspec.prediction_type"):
        if key in report.metadata:
            lines.append(f"{key:<26} {report.metadata[key]}")
    lines += [f"problem: {problem}" for problem in report.problems]
    if not report.ok:
        lines.append(f"{len(report.problems)} problem(s): see above.")
    elif report.full_size:
        lines.append("This LoRA loads in ComfyUI, A1111/Forge, InvokeAI and diffusers.")
    else:
        lines.append("Sound, but made for a base of other widths than SDXL's: it fits only the base it was trained on.")
    return lines


def main(arguments: list[str]) -> int:
    """Prints the report; 0 sound, 1 with problems, 2 unreadable."""
    as_json = "--json" in arguments
    path = Path(next(argument for argument in arguments if argument != "--json"))
    try:
        report = verify_lora(path)
    except CrumbError as error:
        print(f"crumb: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(asdict(report), indent=1) if as_json else "\n".join(report_lines(report)))
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
