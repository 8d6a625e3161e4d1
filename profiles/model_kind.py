"""Tells what a model file is from the names and shapes in its header.

Separate from base_model.py because it is knowledge about other people's files, which grows as new kinds of
model appear, while what crumb needs to know of an SDXL base does not.
"""

import re
from collections.abc import Iterable

SDXL = "SDXL"
_LORA = re.compile(r"(\.(lora_(down|up|A|B)|hada_w1_a|lokr_w[12]|dora_scale)|[._]lora\.(down|up))(\.|_|$)")
_LDM = "model.diffusion_model."
_EMBEDDERS = "conditioner.embedders."

# The attention modules that share one depth in every true SDXL, in LDM names and in diffusers names.
_EQUAL_DEPTH = (
    (
        [*(f"input_blocks.{n}.1" for n in (4, 5)), *(f"output_blocks.{n}.1" for n in (3, 4, 5))],
        [*(f"input_blocks.{n}.1" for n in (7, 8)), "middle_block.1", *(f"output_blocks.{n}.1" for n in (0, 1, 2))],
    ),
    (
        [f"down_blocks.1.attentions.{n}" for n in range(2)] + [f"up_blocks.1.attentions.{n}" for n in range(3)],
        [
            *(f"down_blocks.2.attentions.{n}" for n in range(2)),
            "mid_block.attentions.0",
            *(f"up_blocks.0.attentions.{n}" for n in range(3)),
        ],
    ),
)


def kind_of_file(tensors: dict[str, dict]) -> str:
    """`SDXL` for a single file that holds an SDXL U-Net and both text encoders, else what it is in words."""
    if any(_LORA.search(name) for name in tensors):
        return "a LoRA"
    if not any(name.startswith(_LDM) for name in tensors):
        return _kind_of_part(tensors)
    if _has(tensors, _LDM + "joint_blocks."):
        return "SD3"
    if _has(tensors, _LDM + "double_blocks."):
        return "FLUX"
    if not _has(tensors, _LDM + "input_blocks."):
        return "unknown"
    if _has(tensors, "cond_stage_model.transformer."):
        return "SD 1.5"
    if _has(tensors, "cond_stage_model.model."):
        return "SD 2.x"
    if _has(tensors, _EMBEDDERS + "0.model."):
        return "the SDXL refiner"
    unet = {name.removeprefix(_LDM): info for name, info in tensors.items() if name.startswith(_LDM)}
    if not _has(tensors, _EMBEDDERS + "0.transformer.") or not _has(tensors, _EMBEDDERS + "1.model."):
        return _kind_of_unet(unet)
    if any(name.startswith(("edm_mean", "edm_vpred")) for name in tensors):
        return "an SDXL model of the EDM kind (such as Playground v2.5), with another noise schedule"
    return unet_variant(unet)


def unet_variant(unet: dict[str, dict]) -> str:
    """`SDXL`, or which variant of it a U-Net is, from its LDM or diffusers names (without prefix)."""
    conv_in = unet.get("input_blocks.0.0.weight") or unet.get("conv_in.weight")
    if conv_in is None or not (_has(unet, "label_emb.0.0.") or _has(unet, "add_embedding.linear_1.")):
        return "unknown"
    if conv_in["shape"][1] != 4:
        return f"an SDXL inpainting or editing model ({conv_in['shape'][1]} input channels where SDXL has 4)"
    depths = _depths(unet)
    for groups in _EQUAL_DEPTH:
        found = [{depths.get(module, 0) for module in group} for group in groups]
        if all(len(group) == 1 and group != {0} for group in found):
            return SDXL
    return "a pruned SDXL (such as SSD-1B or Segmind Vega), whose blocks differ from SDXL's"


def _depths(unet: Iterable[str]) -> dict[str, int]:
    """Number of transformer blocks by attention module."""
    depths: dict[str, int] = {}
    for name in unet:
        module, found, rest = name.partition(".transformer_blocks.")
        if found:
            depths[module] = max(depths.get(module, 0), int(rest.partition(".")[0]) + 1)
    return depths


def _kind_of_unet(unet: dict[str, dict]) -> str:
    """A U-Net that came without text encoders."""
    if unet_variant(unet) == SDXL:
        return "an SDXL U-Net alone, without its text encoders"
    return "a U-Net alone, without text encoders"


def _kind_of_part(tensors: dict[str, dict]) -> str:
    """A file without the prefix of a whole checkpoint."""
    if {"clip_l", "clip_g"} & tensors.keys() or "emb_params" in tensors or _has(tensors, "string_to_param"):
        return "an embedding (textual inversion)"
    if _has(tensors, "control_model.") or _has(tensors, "controlnet_") or _has(tensors, "input_hint_block."):
        return "a ControlNet"
    if _has(tensors, "joint_blocks.") or any(".norm1_context." in n and "transformer_blocks." in n for n in tensors):
        return "FLUX" if _has(tensors, "single_transformer_blocks.") else "SD3"
    if _has(tensors, "double_blocks."):
        return "FLUX"
    if _has(tensors, "input_blocks.") or (_has(tensors, "down_blocks.") and _has(tensors, "up_blocks.")):
        return _kind_of_unet(tensors)
    names = {name.removeprefix("first_stage_model.") for name in tensors}
    if {"encoder.conv_in.weight", "decoder.conv_in.weight"} <= names:
        return "a VAE"
    if any(
        re.search(r"(text_model\.encoder\.layers|transformer\.resblocks|encoder\.block)\.\d+\.", n) for n in tensors
    ):
        return "a text encoder"
    return "unknown"


def _has(tensors: Iterable[str], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in tensors)
