"""How a run fits a card's memory: the base's format, what is kept until backward, pictures at a time."""

from crumb.profiles.base_model import BaseModel
from crumb.profiles.derivation import Derivation
from crumb.profiles.hardware import Gpu
from crumb.profiles.vram import BYTES_PER_WEIGHT, estimate_vram_gib

FULL_MODEL_PARAMETERS = 1_000_000_000
SMALL_BASE_BATCH = 4


def derive_memory(result: Derivation, base: BaseModel, gpu: Gpu) -> None:
    result.put("vram_gib", gpu.vram_gib, "", f"{gpu.name}, {gpu.vram_gib:g} GiB" if gpu.vram_gib else "no GPU")
    result.put("device", "cuda" if gpu.vram_gib else "cpu", "", gpu.name)
    result.put("cache_latents", True, "COMMON", "each picture is encoded once; the VAE then leaves memory")
    full = base.num_unet_parameters > FULL_MODEL_PARAMETERS
    result.put("vae_tiling", full and gpu.vram_gib < 12, "COMMON", "below 12 GiB the VAE works in tiles of 512 pixels"
               if full and gpu.vram_gib < 12 else "the VAE takes whole pictures")
    _derive_base_format(result, base, gpu, full)
    _derive_activations(result, base, gpu, full)
    batch_size = 1 if full else SMALL_BASE_BATCH
    if full and gpu.vram_gib >= 16:
        batch_size = max(size for size in (1, 2, 4)
                         if size == 1 or _planned_gib(result, base, size) <= gpu.vram_gib)
    needed_gib = _planned_gib(result, base, batch_size)
    result.put("batch_size", batch_size, "COMMON",
               "this base is small: four at a time learn the same in a quarter of the steps" if not full
               else f"about {needed_gib:.1f} GiB in all" if gpu.vram_gib else "one picture at a time")


def _derive_base_format(result: Derivation, base: BaseModel, gpu: Gpu, full: bool) -> None:
    """The first format in which the base fits with all activations computed twice; the last where none does."""
    if not full or not gpu.vram_gib:
        result.put("quantize_base", "no", "COMMON", "the base stays as it is")
        return
    needed_gib = {how: _needed_gib(result, base, 1, True, how) for how in BYTES_PER_WEIGHT}
    fitting = [how for how, gib in needed_gib.items() if gib <= gpu.vram_gib]
    how = fitting[0] if fitting else "nf4"
    larger = {"int8": "no", "nf4": "int8"}.get(how)
    if larger:
        before = "16 bits" if larger == "no" else larger
        reason = f"in {before} it would need about {needed_gib[larger]:.1f} GiB in all; in {how} {needed_gib[how]:.1f}"
    else:
        reason = f"the base fits as it is (about {needed_gib['no']:.1f} GiB in all)"
    result.put("quantize_base", how, "COMMON", reason)


def _derive_activations(result: Derivation, base: BaseModel, gpu: Gpu, full: bool) -> None:
    """Kept until backward, kept with the largest in int8, or computed twice: the first that fits is the fastest."""
    quantised = result.value("quantize_base")
    kept_gib, in_int8_gib = (_needed_gib(result, base, 1, False, quantised, in_int8) for in_int8 in (False, True))
    kept, in_int8 = not full or gpu.vram_gib >= kept_gib, gpu.vram_gib >= in_int8_gib
    needs = f"activations would need about {kept_gib:.1f} GiB in all, in int8 {in_int8_gib:.1f}"
    reason = needs if not kept else "this base is small: its activations fit" if not full else (
        f"all activations fit (about {kept_gib:.1f} GiB in all)")
    result.put("gradient_checkpointing", not (kept or in_int8), "COMMON",
               f"{reason}: {'nothing is' if kept or in_int8 else 'they are'} computed twice")
    result.put("int8_activations", in_int8 and not kept and not result.value("gradient_checkpointing"), "COMMON", reason)


def _needed_gib(result: Derivation, base: BaseModel, batch_size: int, recompute: bool,
                quantize_base: str, int8_activations: bool = False) -> float:
    return estimate_vram_gib(base.num_unet_parameters, result.value("resolution"), batch_size, recompute,
                             result.value("optimizer"), result.value("targets"), result.value("rank"),
                             result.value("conv_rank"), text_encoders_learn(result), quantize_base, int8_activations)


def _planned_gib(result: Derivation, base: BaseModel, batch_size: int) -> float:
    """With all that is decided so far."""
    return _needed_gib(result, base, batch_size, *(
        result.value(name) for name in ("gradient_checkpointing", "quantize_base", "int8_activations")))


def text_encoders_learn(result: Derivation) -> bool:
    return max(result.overrides.get(name, 0) for name in ("text_encoder_learning_rate", "text_encoder_2_learning_rate")) > 0


def warn_of_memory(result: Derivation, base: BaseModel, gpu: Gpu) -> None:
    needed_gib = _planned_gib(result, base, result.value("batch_size"))
    how = "16 bits" if result.value("quantize_base") == "no" else result.value("quantize_base")
    if base.num_unet_parameters > FULL_MODEL_PARAMETERS and 0 < gpu.vram_gib < needed_gib:
        result.warn("COMMON", f"This run needs about {needed_gib:.1f} GiB of VRAM, its base in {how}, and the card has "
                              f"{gpu.vram_gib:g} GiB: it will most likely stop with an out-of-memory error.")
