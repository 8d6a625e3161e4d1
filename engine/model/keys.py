"""Name maps between checkpoint files and modules, made by rule, in both directions.

U-Net and VAE: LDM (the single file's) <-> diffusers. Text encoders: the single file's <-> transformers'.
Names only, no tensors: LoRA files, checkpoints, the loader and the writer all lean on the same rules.
A name may be a tensor's or a module's; one that no rule knows raises ValueError.
"""

import re
from dataclasses import dataclass

UNET_PREFIX = "model.diffusion_model."
CLIP_L_PREFIX = "conditioner.embedders.0.transformer."
OPEN_CLIP_PREFIX = "conditioner.embedders.1.model."
VAE_PREFIX = "first_stage_model."

_UNET_TOP = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_RESNET = {"conv_shortcut": "nin_shortcut"}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
# Names that diffusers gave the VAE's attention before 0.17, still found in older folders.
_OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_OPEN_CLIP_TOP = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
}
_QKV = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Source:
    """Where a module's tensor lies in a file: its key, which third of dim 0 (None = all), and whether transposed."""

    key: str
    third: int | None = None
    transposed: bool = False


def unet_to_ldm(name: str) -> str:
    """`down_blocks.1.attentions.0.norm.weight` -> `input_blocks.4.1.norm.weight`; SDXL has 2 resnets a level."""
    if top := _swap_head(name, _UNET_TOP):
        return top
    if match := re.fullmatch(r"down_blocks\.(\d+)\.downsamplers\.0\.conv(.*)", name):
        return f"input_blocks.{3 * int(match[1]) + 3}.0.op{match[2]}"
    if match := re.fullmatch(r"up_blocks\.(\d+)\.upsamplers\.0\.conv(.*)", name):
        return f"output_blocks.{3 * int(match[1]) + 2}.2.conv{match[2]}"
    match = re.fullmatch(
        r"(down_blocks\.(\d+)|up_blocks\.(\d+)|mid_block)\.(resnets|attentions)\.(\d+)(?:\.(.+))?", name
    )
    if not match:
        raise ValueError(f"no U-Net tensor or module has the diffusers name {name}")
    _, down, up, kind, index, rest = match.groups()
    slot = int(kind == "attentions")
    if down is not None:
        block = f"input_blocks.{3 * int(down) + int(index) + 1}.{slot}"
    elif up is not None:
        block = f"output_blocks.{3 * int(up) + int(index)}.{slot}"
    else:
        block = f"middle_block.{1 if slot else 2 * int(index)}"
    return _join(block, rest if slot else _inside(rest, _UNET_RESNET))


def unet_from_ldm(key: str) -> str:
    """The inverse of `unet_to_ldm`."""
    if top := _swap_head(key, _inverse(_UNET_TOP)):
        return top
    if match := re.fullmatch(r"middle_block\.([012])(?:\.(.+))?", key):
        if match[1] == "1":
            return _join("mid_block.attentions.0", match[2])
        return _join(f"mid_block.resnets.{int(match[1]) // 2}", _inside(match[2], _inverse(_UNET_RESNET)))
    match = re.fullmatch(r"(input|output)_blocks\.(\d+)\.([012])(?:\.(.+))?", key)
    if not match:
        raise ValueError(f"no U-Net tensor or module has the LDM name {key}")
    side, number, slot, rest = match[1], int(match[2]), match[3], match[4] or ""
    level, layer = divmod(number - 1 if side == "input" else number, 3)
    if side == "input" and layer == 2 and slot == "0" and rest.startswith("op"):
        return f"down_blocks.{level}.downsamplers.0.conv{rest.removeprefix('op')}"
    if side == "output" and layer == 2 and slot == "2" and rest.startswith("conv"):
        return f"up_blocks.{level}.upsamplers.0.{rest}"
    if slot == "2" or (side == "input" and layer == 2):
        raise ValueError(f"no U-Net tensor or module has the LDM name {key}")
    block = f"{'down' if side == 'input' else 'up'}_blocks.{level}"
    if slot == "1":
        return _join(f"{block}.attentions.{layer}", rest)
    return _join(f"{block}.resnets.{layer}", _inside(rest, _inverse(_UNET_RESNET)))


def lora_stem(name: str) -> str:
    """kohya's LoRA stem for a U-Net module, from its diffusers name."""
    return "lora_unet_" + unet_to_ldm(name).replace(".", "_")


def vae_to_ldm(name: str, num_levels: int = 4) -> str:
    """`decoder.up_blocks.0.resnets.0.conv1` -> `decoder.up.3.block.0.conv1`: LDM counts decoder levels backwards."""
    half, _, rest = name.partition(".")
    if half not in ("encoder", "decoder"):
        return name
    rest = rest.replace("conv_norm_out", "norm_out")
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", rest):
        if match[1] == "attentions":
            return f"{half}.mid.attn_{int(match[2]) + 1}.{_inside(match[3], _VAE_ATTENTION)}"
        return f"{half}.mid.block_{int(match[2]) + 1}.{_inside(match[3], _VAE_RESNET)}"
    if match := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(.+)", rest):
        level = int(match[2]) if match[1] == "down" else num_levels - 1 - int(match[2])
        inner = re.sub(r"^resnets\.", "block.", re.sub(r"^(down|up)samplers\.0\.", r"\1sample.", match[3]))
        return f"{half}.{match[1]}.{level}.{inner.replace('conv_shortcut', 'nin_shortcut')}"
    return f"{half}.{rest}"


def vae_from_ldm(key: str, num_levels: int = 4) -> str:
    """The inverse of `vae_to_ldm`."""
    half, _, rest = key.partition(".")
    if half not in ("encoder", "decoder"):
        return key
    rest = re.sub(r"^norm_out", "conv_norm_out", rest)
    if match := re.fullmatch(r"mid\.(block|attn)_(\d+)\.(.+)", rest):
        if match[1] == "attn":
            return f"{half}.mid_block.attentions.{int(match[2]) - 1}.{_inside(match[3], _inverse(_VAE_ATTENTION))}"
        return f"{half}.mid_block.resnets.{int(match[2]) - 1}.{_inside(match[3], _inverse(_VAE_RESNET))}"
    if match := re.fullmatch(r"(down|up)\.(\d+)\.(.+)", rest):
        level = int(match[2]) if match[1] == "down" else num_levels - 1 - int(match[2])
        inner = re.sub(r"^block\.", "resnets.", re.sub(r"^(down|up)sample\.", r"\1samplers.0.", match[3]))
        return f"{half}.{match[1]}_blocks.{level}.{inner.replace('nin_shortcut', 'conv_shortcut')}"
    return f"{half}.{rest}"


def vae_modern_name(name: str) -> str:
    """Today's diffusers name for one from an older VAE folder; today's names come back unchanged."""
    head, found, rest = name.partition(".attentions.0.")
    return head + found + _inside(rest, _OLD_VAE_ATTENTION) if found else name


def text_name(name: str) -> str:
    """A text encoder's tensor or module name with `text_model.` in front, as files and LoRA keys have it.

    transformers 5 dropped that prefix from CLIPTextModel and kept it in CLIPTextModelWithProjection.
    """
    return name if name.startswith(("text_model.", "text_projection")) else f"text_model.{name}"


def open_clip_source(name: str) -> Source:
    """Where OpenCLIP's layout keeps a transformers tensor: q, k, v are thirds of one; the projection is transposed."""
    if name in _OPEN_CLIP_TOP:
        return Source(_OPEN_CLIP_TOP[name], transposed=name == "text_projection.weight")
    match = re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.+)", name)
    if not match:
        raise ValueError(f"no text encoder tensor has the name {name}")
    block, inner = f"transformer.resblocks.{match[1]}", match[2]
    if qkv := re.fullmatch(r"self_attn\.([qkv]_proj)\.(weight|bias)", inner):
        return Source(f"{block}.attn.in_proj_{qkv[2]}", third=_QKV.index(qkv[1]))
    if swapped := _swap_head(inner, _OPEN_CLIP_LAYER):
        return Source(f"{block}.{swapped}")
    raise ValueError(f"no text encoder tensor has the name {name}")


def open_clip_names(key: str) -> list[str]:
    """The transformers tensors that an OpenCLIP tensor holds: three for `in_proj`, else one."""
    if name := _inverse(_OPEN_CLIP_TOP).get(key):
        return [name]
    match = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", key)
    layer = f"text_model.encoder.layers.{match[1]}" if match else ""
    if match and (stacked := re.fullmatch(r"attn\.in_proj_(weight|bias)", match[2])):
        return [f"{layer}.self_attn.{projection}.{stacked[1]}" for projection in _QKV]
    if match and (swapped := _swap_head(match[2], _inverse(_OPEN_CLIP_LAYER))):
        return [f"{layer}.{swapped}"]
    raise ValueError(f"no OpenCLIP tensor has the name {key}")


def _swap_head(name: str, table: dict[str, str]) -> str | None:
    """`name` with the head that `table` knows exchanged; None where it knows none."""
    for head, other in table.items():
        if name == head or name.startswith(head + "."):
            return other + name.removeprefix(head)
    return None


def _inside(rest: str | None, table: dict[str, str]) -> str | None:
    return rest and (_swap_head(rest, table) or rest)


def _join(block: str, rest: str | None) -> str:
    return f"{block}.{rest}" if rest else block


def _inverse(table: dict[str, str]) -> dict[str, str]:
    return {value: key for key, value in table.items()}
