"""Which GPU is meant: the one in this machine (through NVML), or one named from gpus.toml.

Torch-free, and fine without a driver: "no GPU" is an answer here, not an error.
"""

import os
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from crumb.profiles.errors import RequestError
from crumb.profiles.gpu_table import MEMORY_SIZE, Gpu, card_fields, find_card, gpu_table, guessed_fields, is_virtual, name_key

GIB = 2**30
MEMORY_INFO = Path("/proc/meminfo")

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
            return Gpu(f"unknown card, {vram_gib:g} GiB", vram_gib, 8.6, note="card unknown: taken as RTX 30 or newer",
                       **guessed_fields("RTX", vram_gib, 8.6))
        return found if vram_gib is None else replace(found, vram_gib=vram_gib)
    return _from_table(name, vram_gib)


def detect_gpu() -> Gpu | None:
    """The first card that CUDA_VISIBLE_DEVICES leaves to us, as NVML reports it; None without an NVIDIA driver.

    A number in that variable is taken as NVML counts, by the slot; CUDA counts so under CUDA_DEVICE_ORDER=PCI_BUS_ID.
    """
    nvml = _start_nvml()
    if nvml is None:
        return None
    try:
        handle = _first_visible(nvml)
        return None if handle is None else _describe(nvml, handle)
    except nvml.NVMLError:
        return None
    finally:
        _ask(nvml, "nvmlShutdown")


def host_memory_bytes() -> int | None:
    """What of this machine's memory can be had without swapping; None where the system doesn't say."""
    try:
        lines = MEMORY_INFO.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def count_gpus() -> int:
    """The cards in this machine that CUDA_VISIBLE_DEVICES leaves to us; 0 without an NVIDIA driver."""
    nvml = _start_nvml()
    if nvml is None:
        return 0
    count = _ask(nvml, "nvmlDeviceGetCount") or 0
    _ask(nvml, "nvmlShutdown")
    visible = _visible()
    return count if visible is None else min(count, len(visible))


def _start_nvml() -> Any:
    """The pynvml module, ready to be asked; None where it can't be."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no package, no driver, or a driver that does not match: all mean "not known"
        return None
    return pynvml


def _ask(nvml: Any, function: str, *arguments: Any) -> Any:
    """What NVML says; None where driver or package don't know the question, or this card not the answer."""
    try:
        return getattr(nvml, function)(*arguments)
    except (nvml.NVMLError, AttributeError):
        return None


def _visible() -> list[str] | None:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return None if visible is None else [name.strip() for name in visible.split(",") if name.strip()]


def _first_visible(nvml: Any) -> Any:
    """The handle of the card, or the slice of one, that training would run on; None where all are hidden."""
    visible = _visible()
    if visible is None:
        return nvml.nvmlDeviceGetHandleByIndex(0)
    if not visible or visible[0].startswith("-"):  # CUDA reads up to the first number that is none of a card
        return None
    if visible[0].isdigit():
        return nvml.nvmlDeviceGetHandleByIndex(int(visible[0]))
    return nvml.nvmlDeviceGetHandleByUUID(visible[0])


def _describe(nvml: Any, handle: Any) -> Gpu:
    """Name, memory and compute capability must be there; what else NVML leaves open comes from the table."""
    card, piece = _mig(nvml, handle)
    name = nvml.nvmlDeviceGetName(card)
    name = name if isinstance(name, str) else name.decode()
    memory = nvml.nvmlDeviceGetMemoryInfo(piece or card)
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(card)
    capability, vram_gib = float(f"{major}.{minor}"), memory.total / GIB
    known = find_card(name)
    whole_gib = _total_gib(nvml, card) if piece else vram_gib
    fields = card_fields(known, whole_gib) if known else guessed_fields(
        name, whole_gib, capability, _ask(nvml, "nvmlDeviceGetNumGpuCores", card) or 0)
    note = ""
    if is_virtual(name):
        note = f"{name} is a share of a card: its rates are those of the whole, and others may use it too."
    if piece:
        fields, note = _share(fields, _ask(nvml, "nvmlDeviceGetAttributes", piece), name)
    return replace(Gpu(name, round(vram_gib, 1), capability, memory.free / GIB, note, **fields), **_link(nvml, card))


def _total_gib(nvml: Any, card: Any) -> float:
    memory = _ask(nvml, "nvmlDeviceGetMemoryInfo", card)  # of the whole card, which a container may not be allowed to ask
    return memory.total / GIB if memory else 0.0


def _mig(nvml: Any, handle: Any) -> tuple[Any, Any]:
    """(card, its slice that CUDA would take or None): with MIG on, CUDA sees slices and never the whole card."""
    if _ask(nvml, "nvmlDeviceIsMigDeviceHandle", handle):
        return nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle), handle
    mode = _ask(nvml, "nvmlDeviceGetMigMode", handle)
    if not mode or not mode[0]:
        return handle, None
    pieces = (_ask(nvml, "nvmlDeviceGetMigDeviceHandleByIndex", handle, at)
              for at in range(_ask(nvml, "nvmlDeviceGetMaxMigDeviceCount", handle) or 0))
    return handle, next(filter(None, pieces), None)


def _share(fields: dict, attributes: Any, name: str) -> tuple[dict, str]:
    """Rates of a slice, by its share of the SMs."""
    num_sms, all_sms = getattr(attributes, "multiprocessorCount", 0), fields.get("sms", 0)
    if not num_sms or not all_sms:
        return fields, f"This is a MIG slice of {name}: how fast it is beside the whole is not known."
    rates = [key for key in fields if key.endswith(("_tflops", "_tops", "bandwidth_gb_per_s"))]
    shared = {key: fields[key] * num_sms / all_sms for key in rates}
    return (fields | shared | {"sms": num_sms, "rates_from": f"{fields['rates_from']}, of which {num_sms} SMs"},
            f"This is a MIG slice of {name}, with {num_sms} of its {all_sms} SMs.")


def _link(nvml: Any, card: Any) -> dict:
    """The PCIe link as it can be in this slot: the generation drops when a card idles, its width does not."""
    generation = _ask(nvml, "nvmlDeviceGetMaxPcieLinkGeneration", card)
    lanes = _ask(nvml, "nvmlDeviceGetCurrPcieLinkWidth", card) or _ask(nvml, "nvmlDeviceGetMaxPcieLinkWidth", card)
    return {key: value for key, value in (("pcie_generation", generation), ("pcie_lanes", lanes)) if value}


def _from_table(name: str, vram_gib: float | None) -> Gpu:
    size_in_name = MEMORY_SIZE.search(name)
    if size_in_name and vram_gib is None:
        vram_gib = float(size_in_name[1])
    families, cards = gpu_table()
    known = find_card(name)
    if known is None:
        by_key = {name_key(card): card for card in cards}
        near = get_close_matches(name_key(name), by_key, n=3, cutoff=0.4)
        hint = f" Did you mean {' or '.join(by_key[match] for match in near)}?" if near else ""
        raise RequestError(f"The GPU {name!r} is not in crumb's table.{hint} `--gpu auto` asks the machine; "
                           f"`--gpu auto --vram 8` plans for any card with 8 GiB.")
    sizes, note = cards[known]["vram_gib"], ""
    if vram_gib is None:
        vram_gib = float(sizes[0])
        if len(sizes) > 1:
            others = " and ".join(f"{size} GiB" for size in sizes[1:])
            note = f"{known} is also sold with {others}; planned for {sizes[0]} GiB. Say --vram if yours has more."
    capability = families[cards[known]["family"]]["compute_capability"]
    return Gpu(known, float(vram_gib), capability, note=note, **card_fields(known, vram_gib))
