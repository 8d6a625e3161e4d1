"""The network in kohya's keys: its type, layers, ranks, alphas and blocks, read into plan settings.

Each function takes a whole file, since these keys change meaning with their neighbours.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

from crumb.profiles.blocks import ATTENTION_BLOCKS, CONVOLUTION_BLOCKS, RESNET_BLOCKS
from crumb.profiles.errors import RequestError
from crumb.profiles.kohya.values import (
    BLOCK_POSITIONS,
    DOWN_WEIGHTS,
    MID_WEIGHTS,
    UP_WEIGHTS,
    KohyaFile,
    Untaken,
    blocks_of,
    is_neutral,
    number,
    weight_list,
    whole,
)
from crumb.profiles.plan import plan_fields

LOW_RANK = {"loha": "LoHa", "lokr": "LoKr", "dylora": "DyLoRA", "glora": "GLoRA", "lora_fa": "LoRA-FA", "lora-fa": "LoRA-FA"}
"""Network types that also add a change of low rank; a LoRA of the same rank is the nearest to them."""
MAX_RANK = 1024

BLOCKWISE = ("block_dims", "down_lr_weight", "mid_lr_weight", "up_lr_weight")
"""One of them makes sd-scripts read the other lists by block."""

CONV_MIDDLE = 0
"""Of the middle's three, the first that holds 3x3 convolutions."""


def network_kind(file: KohyaFile) -> str:
    """The network type as LyCORIS calls it: lora, loha, lokr ... RequestError for another model family's."""
    module = str(file.get("network_module", "networks.lora")).lower()
    if module == "lycoris.kohya":
        return str(file.get("algo", "lora")).lower()
    return module.rsplit(".", 1)[-1]


def method(file: KohyaFile) -> dict[str, Any]:
    kind = network_kind(file)
    if kind in ("lora", "locon"):
        return {"method": "lora"}
    if kind in (plan_fields()["method"].metadata["choices"] or ()):
        return {"method": kind}
    if kind in LOW_RANK:
        raise Untaken(f"crumb trains LoRA and LoCon, not {LOW_RANK[kind]}: a LoRA of the same rank stands in, which learns "
                      f"other weights and makes another file")
    key, value = file.source("network_module")
    raise RequestError(f"{file.path}: {key} is {value!r}, whose settings mean nothing for another network. crumb trains LoRA "
                       f"(attention and feed-forward) and LoCon (3x3 convolutions too): choose one of them there, or make "
                       f"a plan with `crumb plan`.")


def rank_fits(file: KohyaFile, key: str) -> bool:
    return key in file and 0 < number(file[key]) <= MAX_RANK


def alpha(file: KohyaFile) -> dict[str, Any]:
    if "network_dim" in file and not rank_fits(file, "network_dim"):
        raise Untaken("alpha is a share of the rank, and the rank is left to the guide")
    value = number(file["network_alpha"])
    return {"alpha": value or number(file.get("network_dim", 4))}  # 0 means the rank itself there


def convolutions(file: KohyaFile) -> dict[str, Any]:
    """`targets` and `conv_rank`, which say it twice in a plan."""
    lycoris = file.get("network_module") == "lycoris.kohya"
    preset = str(file.get("preset", "full")) if lycoris else ""
    if preset.startswith("attn-only"):
        return {"targets": "attention", "conv_rank": 0}
    if preset in ("attn-mlp", "full-lin", "unet-transformer-only"):
        return {"targets": "attention+ff", "conv_rank": 0}
    if preset and preset != "full":
        file.remarks.append(f"crumb has no preset {preset}; all of the U-Net's layers learn")
    value = whole(file.get("conv_dim") or (file.get("network_dim", 4) if lycoris else 0))
    of_blocks = _conv_ranks(file)
    if of_blocks is not None and not (value and of_blocks):
        value = next((rank for rank, _ in of_blocks.most_common(1)), 0)
        file.remarks.append("the commonest of conv_block_dims")
    if not value:
        return {"targets": "attention+ff", "conv_rank": 0}
    return {"targets": "attention+ff+conv", "conv_rank": value}


def conv_alpha(file: KohyaFile) -> dict[str, Any]:
    if "conv_dim" in file and not rank_fits(file, "conv_dim") and not _is_used(file, "conv_block_dims"):
        raise Untaken("it is a share of the convolutions' rank, and none is taken over")
    if "conv_alpha" not in file:
        if not _is_used(file, "conv_block_dims"):
            return {}
        file.remarks.append("unset: sd-scripts' own")
    return {"conv_alpha": number(file.get("conv_alpha", 1)) or number(file.get("conv_dim", 1))}


def block_ranks(file: KohyaFile) -> dict[str, Any]:
    conv = not is_neutral(file.get("conv_dim", 0), (0,)) or _is_used(file, "conv_block_dims")
    ranks = blocks_of(file["block_dims"], BLOCK_POSITIONS, number(file.get("network_dim", 4)), whole)
    return {"block_ranks": _without_idle(ranks, RESNET_BLOCKS if conv else ATTENTION_BLOCKS)}


def block_alphas(file: KohyaFile) -> dict[str, Any]:
    if not _is_used(file, "block_alphas"):
        return _unused(file, "block_alphas")
    return {"block_alphas": blocks_of(file["block_alphas"], BLOCK_POSITIONS, number(file.get("network_alpha", 1)))}


def conv_block_ranks(file: KohyaFile) -> dict[str, Any]:
    if not _is_used(file, "conv_block_dims"):
        return _unused(file, "conv_block_dims")
    if not (rank := _general_conv_rank(file)):
        return {"conv_block_ranks": {}}
    return {"conv_block_ranks": _without_idle(_of_convolutions(file, "conv_block_dims", rank, whole), CONVOLUTION_BLOCKS)}


def conv_block_alphas(file: KohyaFile) -> dict[str, Any]:
    if not _is_used(file, "conv_block_alphas"):
        return _unused(file, "conv_block_alphas")
    if not _general_conv_rank(file):
        return {"conv_block_alphas": {}}
    alpha = _quietly(conv_alpha, file)["conv_alpha"]
    return {"conv_block_alphas": _of_convolutions(file, "conv_block_alphas", alpha, number)}


def _general_conv_rank(file: KohyaFile) -> int:
    rank = _quietly(convolutions, file)["conv_rank"]
    if not 0 <= rank <= MAX_RANK:
        raise Untaken("it goes with the convolutions' rank, and none is taken over")
    return rank


def _conv_ranks(file: KohyaFile) -> Counter[int] | None:
    """How often each rank above 0 stands in conv_block_dims; None where that is not read, or can't be."""
    if not _is_used(file, "conv_block_dims"):
        return None
    try:
        ranks = blocks_of(file["conv_block_dims"], BLOCK_POSITIONS, 0, whole, CONV_MIDDLE)
    except Untaken:  # its own row says so
        return None
    return Counter(rank for block, rank in ranks.items() if block in CONVOLUTION_BLOCKS)


def _of_convolutions(file: KohyaFile, key: str, general: float, read: Callable) -> dict[str, Any]:
    first, last = (blocks_of(file[key], BLOCK_POSITIONS, general, read, middle) for middle in (CONV_MIDDLE, 2))
    if first != last:
        file.remarks.append("MID as the first of its two resnets")
    return first


def _is_used(file: KohyaFile, key: str) -> bool:
    """Whether sd-scripts reads the list; a missing one is not."""
    beside = {"conv_block_alphas": ["conv_block_dims"]}.get(key, [])
    return all(name in file for name in (key, *beside)) and any(name in file for name in BLOCKWISE)


def _unused(file: KohyaFile, key: str) -> dict[str, Any]:
    beside = "conv_block_dims and " if key == "conv_block_alphas" else ""
    file.unused.append((*file.source(key), f"sd-scripts reads it only beside {beside}block_dims or block weights"))
    return {}


def _without_idle(ranks: dict[str, int], with_layers: tuple) -> dict[str, int]:
    """Without the zeros of blocks that have no such layers anyway."""
    return {block: rank for block, rank in ranks.items() if rank or block in with_layers}


def _quietly(read: Callable[[KohyaFile], dict[str, Any]], file: KohyaFile) -> dict[str, Any]:
    """Another setting's value, without its remarks on this one."""
    return read(dataclasses.replace(file, remarks=[]))


def block_rates(file: KohyaFile) -> dict[str, Any]:
    rates: dict[str, Any] = {}
    for key, positions in (("down_lr_weight", DOWN_WEIGHTS), ("mid_lr_weight", MID_WEIGHTS), ("up_lr_weight", UP_WEIGHTS)):
        if key in file:
            rates |= blocks_of(weight_list(file[key], len(positions)), positions, 1.0)
    return {"block_rates": rates}


def lora_plus(file: KohyaFile) -> dict[str, Any]:
    """0 and unset mean off there, 1 here."""
    given = {key: number(file.get(key, 0)) for key in
             ("loraplus_unet_lr_ratio", "loraplus_lr_ratio", "loraplus_text_encoder_lr_ratio")}
    if given["loraplus_text_encoder_lr_ratio"] not in (0, given["loraplus_unet_lr_ratio"] or given["loraplus_lr_ratio"]):
        file.remarks.append("one ratio for U-Net and text encoders")
    return {"lora_plus_ratio": next(filter(None, given.values()), 1.0)}
