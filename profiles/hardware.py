"""Which GPU is meant: the one in this machine (through NVML), or one named from gpus.toml.

Torch-free, and fine without a driver: "no GPU" is an answer here, not an error.
"""

import os
import re
import tomllib
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.resources import files

from crumb.profiles.errors import RequestError

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """A card to plan for; `vram_gib` 0 means no GPU at all."""

    name: str
    vram_gib: float
    compute_capability: float
    free_gib: float | None = None
    """Free memory now; None when the card is only a name in the table."""
    note: str = ""

    @property
    def has_bf16(self) -> bool:
        return self.compute_capability >= 8.0


NO_GPU = Gpu("no GPU (CPU)", 0.0, 0.0)


def resolve_gpu(name: str = "auto", vram_gib: float | None = None) -> Gpu:
    """The GPU that an answer means: `auto`, `cpu` or a card's name; `vram_gib` overrides its memory."""
    if vram_gib is not None and not 0 <= vram_gib <= 1024:
        raise RequestError(f"{vram_gib:g} GiB of VRAM can't be right; give the card's memory, for example --vram 8.")
    if name.lower() in ("cpu", "none"):
        return NO_GPU
    if name.lower() == "auto":
        found = detect_gpu()
        if found is None:
            if not vram_gib:
                return NO_GPU
            return Gpu(f"unknown card, {vram_gib:g} GiB", vram_gib, 8.0, note="card unknown: taken as RTX 30 or newer")
        return found if vram_gib is None else _with_vram(found, vram_gib)
    return _from_table(name, vram_gib)


def detect_gpu(index: int = 0) -> Gpu | None:
    """The card in this machine as NVML reports it; None without an NVIDIA driver."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no package, no driver, or a driver that does not match: all mean "not known"
        return None
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
        name = pynvml.nvmlDeviceGetName(handle)
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()
    name = name if isinstance(name, str) else name.decode()
    return Gpu(name, round(memory.total / GIB, 1), float(f"{major}.{minor}"), free_gib=memory.free / GIB)


def count_gpus() -> int:
    """The cards in this machine that CUDA_VISIBLE_DEVICES leaves to us; 0 without an NVIDIA driver."""
    try:
        import pynvml

        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
        pynvml.nvmlShutdown()
    except Exception:  # as in detect_gpu
        return 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return count if visible is None else min(count, len([name for name in visible.split(",") if name.strip()]))


def _with_vram(gpu: Gpu, vram_gib: float) -> Gpu:
    return Gpu(gpu.name, vram_gib, gpu.compute_capability, gpu.free_gib, gpu.note)


def _from_table(name: str, vram_gib: float | None) -> Gpu:
    cards = tomllib.loads(files("crumb.profiles").joinpath("gpus.toml").read_text())["cards"]
    size_in_name = re.search(r"\b(\d+)\s*g(?:i?b)?\b", name, re.IGNORECASE)
    if size_in_name and vram_gib is None:
        vram_gib = float(size_in_name[1])
    bare = re.sub(r"\b\d+\s*g(?:i?b)?\b", "", name, flags=re.IGNORECASE)
    by_key = {_key(card): card for card in cards}
    key = _key(bare)
    if key not in by_key and "rtx" + key in by_key:
        key = "rtx" + key
    if key not in by_key and "gtx" + key in by_key:
        key = "gtx" + key
    if key not in by_key:
        near = get_close_matches(key, by_key, n=3, cutoff=0.4)
        hint = f" Did you mean {' or '.join(by_key[match] for match in near)}?" if near else ""
        raise RequestError(f"The GPU {name!r} is not in crumb's table.{hint} `--gpu auto` asks the machine; "
                           f"`--gpu auto --vram 8` plans for any card with 8 GiB.")
    card = cards[by_key[key]]
    sizes = card["vram_gib"]
    note = ""
    if vram_gib is None:
        vram_gib = float(sizes[0])
        if len(sizes) > 1:
            others = " and ".join(f"{size} GiB" for size in sizes[1:])
            note = f"{by_key[key]} is also sold with {others}; planned for {sizes[0]} GiB. Say --vram if yours has more."
    return Gpu(by_key[key], float(vram_gib), float(card["compute_capability"]), note=note)


def _key(name: str) -> str:
    return re.sub(r"nvidia|geforce|tesla|[^a-z0-9]", "", name.lower())
