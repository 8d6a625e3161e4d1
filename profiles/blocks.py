"""SDXL's U-Net by the names that people use for its blocks (BLOCK-UI)."""

import re

BLOCKS = (*(f"IN{n:02d}" for n in range(9)), "MID", *(f"OUT{n:02d}" for n in range(9)))
"""input_blocks.0-8, middle_block, output_blocks.0-8 of the original layout."""

CONVOLUTION_BLOCKS = BLOCKS[1:]
"""Those with 3x3 convolutions that learn; IN00 is the U-Net's entrance alone."""

RESNET_BLOCKS = tuple(block for block in CONVOLUTION_BLOCKS if block not in ("IN03", "IN06"))
"""Those with linears and 1x1 convolutions where the 3x3 ones learn too; IN03 and IN06 only halve the size."""

ATTENTION_BLOCKS = ("IN04", "IN05", "IN07", "IN08", "MID", "OUT00", "OUT01", "OUT02", "OUT03", "OUT04", "OUT05")


def block_of(stem: str) -> str:
    """The block of a LoRA module, by its name in the file; "" for one of a text encoder."""
    match = re.match(r"lora_unet_(input|middle|output)_blocks?_(\d+)", stem)
    if not match:
        return ""
    return "MID" if match[1] == "middle" else f"{'IN' if match[1] == 'input' else 'OUT'}{int(match[2]):02d}"
