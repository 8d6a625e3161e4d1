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
    result.put("int8_activations", False, "COMMON", "activations are kept as they are, or computed twice")
    kept_gib = _needed_gib(result, base, 1, recompute=False)
    if not full:
        result.put("gradient_checkpointing", False, "COMMON", "this base is small: its activations fit as they are")
    elif gpu.vram_gib < kept_gib:
        result.put("gradient_checkpointing", True, "COMMON",
                   f"keeping all activations would need about {kept_gib:.0f} GiB, so they are computed twice")
    else:
        result.put("gradient_checkpointing", False, "COMMON",
                   f"all activations fit (about {kept_gib:.0f} GiB in all): nothing is computed twice")
    batch_size = 1 if full else SMALL_BASE_BATCH
    if full and gpu.vram_gib >= 16:
        recompute = result.value("gradient_checkpointing")
        batch_size = max(size for size in (1, 2, 4)
                         if size == 1 or _needed_gib(result, base, size, recompute) <= gpu.vram_gib)
    needed_gib = _needed_gib(result, base, batch_size, result.value("gradient_checkpointing"))
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


def _needed_gib(result: Derivation, base: BaseModel, batch_size: int, recompute: bool,
                quantize_base: str | None = None) -> float:
    return estimate_vram_gib(base.num_unet_parameters, result.value("resolution"), batch_size, recompute,
                             result.value("optimizer"), result.value("targets"), result.value("rank"),
                             result.value("conv_rank"), text_encoders_learn(result),
                             quantize_base or result.value("quantize_base"),
                             quantize_base is None and result.value("int8_activations"))


def text_encoders_learn(result: Derivation) -> bool:
    return max(result.overrides.get(name, 0) for name in ("text_encoder_learning_rate", "text_encoder_2_learning_rate")) > 0


def warn_of_memory(result: Derivation, base: BaseModel, gpu: Gpu) -> None:
    needed_gib = _needed_gib(result, base, result.value("batch_size"), result.value("gradient_checkpointing"))
    how = "16 bits" if result.value("quantize_base") == "no" else result.value("quantize_base")
    if base.num_unet_parameters > FULL_MODEL_PARAMETERS and 0 < gpu.vram_gib < needed_gib:
        result.warn("COMMON", f"This run needs about {needed_gib:.1f} GiB of VRAM, its base in {how}, and the card has "
                              f"{gpu.vram_gib:g} GiB: it will most likely stop with an out-of-memory error.")
