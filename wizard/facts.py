"""What was found in the named files and in this machine, in lines of text for either form of the wizard."""

from collections import Counter

from crumb.profiles.base_model import BaseModel
from crumb.profiles.data_rules import plan_crops
from crumb.profiles.dataset import Scan
from crumb.profiles.hardware import GIB, Gpu
from crumb.wizard.dashboard.state import clean

NUM_BUCKETS_SHOWN = 6
NUM_PROBLEMS_SHOWN = 12
BAR_CELLS = 30
MILLION = 1_000_000


def describe_scan(scan: Scan, resolution: int) -> list[str]:
    """Count, sizes, captions, the buckets as bars, then what is wrong by file (`!` can't be used, `?` can)."""
    sizes = sorted((picture.width * picture.height, picture.width, picture.height) for picture in scan.pictures)
    smallest, largest = ("{1}x{2}".format(*size) for size in (sizes[0], sizes[-1]))
    num_without = sum(picture.caption is None for picture in scan.pictures)
    captions = "all with captions" if not num_without else f"{num_without} without caption"
    lines = [f"{len(scan.pictures)} pictures, {smallest} to {largest} pixels, {captions}", *_buckets(scan, resolution)]
    if scan.problems:
        lines.append(f"{len(scan.problems)} remarks on files:")
    for problem in scan.problems[:NUM_PROBLEMS_SHOWN]:
        lines.append(f"{'!' if problem.fatal else '?'} {clean(problem.path.name)}: {clean(problem.text)}")
    if len(scan.problems) > NUM_PROBLEMS_SHOWN:
        lines.append(f"  and {len(scan.problems) - NUM_PROBLEMS_SHOWN} more")
    return lines


def _buckets(scan: Scan, resolution: int) -> list[str]:
    counts = Counter((crop.width, crop.height) for crop in plan_crops(scan.pictures, resolution, True, False))
    most = max(counts.values())
    lines = [f"They train in {len(counts)} sizes (buckets of about {resolution}x{resolution} pixels):"]
    for (width, height), count in counts.most_common(NUM_BUCKETS_SHOWN):
        lines.append(f"  {f'{width}x{height}':<10} {'#' * max(1, round(BAR_CELLS * count / most))} {count}")
    rest = sum(counts.values()) - sum(count for _, count in counts.most_common(NUM_BUCKETS_SHOWN))
    return [*lines, f"  other      {rest}"] if rest else lines


def describe_base(base: BaseModel) -> list[str]:
    """What the header says."""
    path = base.path
    size = path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.rglob("*.safetensors"))
    layout = "one file" if base.layout == "single_file" else "diffusers folder"
    predicts = {"epsilon": "noise (epsilon)", "v_prediction": "velocity (v-prediction)", None: "not said"}
    return [
        f"SDXL, {layout}, {size / GIB:.2f} GiB, stored in {base.dtype}",
        f"U-Net of {base.num_unet_parameters / MILLION:,.0f} million weights, made for {base.native_resolution} pixels",
        f"predicts: {predicts[base.prediction_type]} ({base.prediction_evidence})",
        "VAE: baked in" if base.has_vae else "VAE: none baked in",
        *(["trained with zero terminal SNR"] if base.zero_terminal_snr else []),
    ]


def describe_gpu(gpu: Gpu, detected: bool) -> list[str]:
    """The card that a plan would be made for."""
    where = "in this machine" if detected else "planned for"
    if not gpu.vram_gib:
        return ["No graphics card: training runs on the processor.",
                "That is only practical for `crumb demo`: a full SDXL takes minutes per step."]
    free = f", {gpu.free_gib:.1f} GiB free now" if gpu.free_gib is not None else ""
    precision = "bf16" if gpu.has_bf16 else "no bf16, so fp16"
    return [f"{gpu.name} ({where}): {gpu.vram_gib:g} GiB{free}, {precision}", *([gpu.note] if gpu.note else [])]
