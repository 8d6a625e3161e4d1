"""What a run needs of the GPU's memory, by arithmetic, so that no plan is made that can't fit.

The activation figures were counted, not measured on a GPU: tensors saved for backward by the full-size U-Net with
crumb's LoRA layers at 1024x1024 and batch 1 in 16 bits with flash attention. They grow with the picture's area.
"""

from crumb.profiles.hardware import GIB

KEPT_ACTIVATIONS_GIB = 3.8
KEPT_IN_INT8_GIB = 3.1
RECOMPUTED_ACTIVATIONS_GIB = 0.65
RESERVE_GIB = 1.2
"""CUDA context, workspaces, transients and what the desktop takes."""

BYTES_PER_WEIGHT = {"no": 2.0, "int8": 1.02, "nf4": 0.6}
"""Of the U-Net. nf4 has convolutions in int8; norms, embeddings and the ends stay in 16 bits."""

TEXT_ENCODERS_GIB = 1.7
"""Both text encoders in 16 bits (817,720,320 weights) and what they keep of 77 tokens, where they learn."""

PARAMETERS_PER_RANK = {"attention": 1_451_000, "attention+ff": 2_660_000, "attention+ff+conv": 2_660_000}
PARAMETERS_PER_CONV_RANK = 414_000
"""LoRA weights of full-size SDXL for each unit of rank; the counts of the published LoRA formats."""

STATE_BYTES = {"AdamW8bit": 2, "AdamW": 8, "Prodigy": 14, "Prodigy8bit": 2.5, "DAdaptAdam": 12, "Adafactor": 0.1, "Lion": 4}
"""Optimizer bytes per trained weight, beside 4 for the weight and 4 for its gradient."""


def estimate_vram_gib(num_unet_parameters: int, resolution: int, batch_size: int, recompute: bool, optimizer: str,
                      targets: str, rank: int, conv_rank: int, text_encoders_learn: bool = False, quantize_base: str = "no",
                      int8_activations: bool = False) -> float:
    """Peak GPU memory of training a full-size SDXL."""
    weights = num_unet_parameters * BYTES_PER_WEIGHT[quantize_base] / GIB
    kept = KEPT_IN_INT8_GIB if int8_activations else KEPT_ACTIVATIONS_GIB
    per_picture = RECOMPUTED_ACTIVATIONS_GIB if recompute else kept
    activations = per_picture * batch_size * (resolution / 1024) ** 2
    num_parameters = PARAMETERS_PER_RANK[targets] * rank + PARAMETERS_PER_CONV_RANK * conv_rank
    return weights + activations + num_parameters * (8 + STATE_BYTES[optimizer]) / GIB + RESERVE_GIB + (
        TEXT_ENCODERS_GIB if text_encoders_learn else 0)
