"""Reads LoRA files, of crumb and of other programs: kohya's names, diffusers' and PEFT's."""

import json
import math
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from crumb.engine.model.keys import lora_stem
from crumb.engine.network.lora import LoRALayer, Network
from crumb.engine.network.verify import known_stems, unet_modules
from crumb.profiles.errors import RequestError
from crumb.profiles.lora_file import LORA_KEY, not_plain
from crumb.profiles.safetensors_header import read_header

_TEXT_ENCODERS = {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}


@dataclass(frozen=True)
class Change:
    """One module's change, scale · up · down: `down` (R, in, ...) and `up` (out, R, ...), fp32."""

    down: Tensor
    up: Tensor
    scale: float


def read_lora(path: Path) -> dict[str, Change]:
    """The file's changes by kohya's stems, on the CPU. RequestError where it is damaged or no plain LoRA of SDXL."""
    header, metadata = read_header(path)
    parts: dict[str, dict[str, str]] = defaultdict(dict)
    names: dict[str, str] = {}
    for key in header:
        match = LORA_KEY.fullmatch(key)
        stem = match and _stem(match["name"])
        if not stem:
            raise not_plain(path, key)
        kind = "alpha" if match["kind"] == "alpha" else "down" if re.search("down|lora_A", match["kind"]) else "up"
        parts[stem][kind] = key
        names[stem] = match["name"]
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise RequestError(f"{path} can't be read: {error}.") from None
    adapters = _peft_adapters(path, metadata)
    changes = {}
    for stem, keys in parts.items():
        if not {"down", "up"} <= keys.keys():
            raise RequestError(f"{path} has only part of {stem}. It is damaged: fetch it again.")
        down, up = tensors[keys["down"]].float(), tensors[keys["up"]].float()
        rank = down.shape[0]
        scale = tensors[keys["alpha"]].item() / rank if "alpha" in keys else _peft_scale(adapters, names[stem], rank)
        if not (down.isfinite().all() and up.isfinite().all() and math.isfinite(scale)):
            raise RequestError(f"{path}: {stem} holds NaN or infinity. `crumb verify {path}` shows more.")
        changes[stem] = Change(down, up, scale)
    return changes


def start_from(network: Network, path: Path) -> tuple[int, list[str]]:
    """Fills the network's layers from a file, in place; ranks may differ.

    Returns how many layers were filled and which of the file's modules the network doesn't have.
    """
    changes = read_lora(path)
    known = changes.keys() & network.layers.keys()
    if not known:
        raise RequestError(f"None of the {len(changes)} modules of {path} is trained by this plan (targets, "
                           f"blocks). Choose another file, or other targets.")
    for stem in known:
        layer = network.layers[stem]
        require_fit(changes[stem], layer, stem, path)
        down, up = fitted(changes[stem], layer.rank)
        with torch.no_grad():
            num_ranks = down.shape[0]
            layer.lora_A[:num_ranks] = down
            layer.lora_B.zero_()
            layer.lora_B[:, :num_ranks] = (up / layer.scaling).view(up.shape[0], num_ranks, *layer.lora_B.shape[2:])
    return len(known), sorted(changes.keys() - network.layers.keys())


def require_fit(change: Change, layer: LoRALayer, stem: str, path: Path) -> None:
    """RequestError where the change is not one of a layer as large as this."""
    down, up = change.down.shape, change.up.shape
    if down[1:] != layer.lora_A.shape[1:] or up[0] != layer.lora_B.shape[0] or up[1] != down[0]:
        raise RequestError(f"{path}: {stem} has the shapes {list(down)} and {list(up)}, which don't fit the base model. Is it "
                           f"made for another base?")


def fitted(change: Change, rank: int) -> tuple[Tensor, Tensor]:
    """(down, up) of at most `rank` whose product is the change, or its best approximation (Eckart & Young 1936)."""
    down, up = change.down, change.up.flatten(1) * change.scale
    if down.shape[0] <= rank:
        return down, up
    # The product is large, its factors are not: QR of both leaves an SVD of R x R.
    q_up, r_up = torch.linalg.qr(up.double())
    q_down, r_down = torch.linalg.qr(down.flatten(1).double().T)
    u, s, v = torch.linalg.svd(r_up @ r_down.T)
    root = s[:rank].sqrt()
    best_up, best_down = q_up @ u[:, :rank] * root, (q_down @ v.T[:, :rank] * root).T
    return best_down.float().view(rank, *down.shape[1:]), best_up.float()


def _stem(name: str) -> str | None:
    """kohya's stem for a module named in any of the three ways."""
    if name in known_stems():
        return name
    if not _by_diffusers_stem:
        _by_diffusers_stem.update({"lora_unet_" + module.replace(".", "_"): lora_stem(module) for module in unet_modules()})
    if name in _by_diffusers_stem:
        return _by_diffusers_stem[name]
    part, _, rest = name.partition(".")
    rest = re.sub(r"\.processor\.(to_[qkv]|to_out)_lora", r".\1", rest)
    if part == "unet":
        return _by_diffusers_stem.get("lora_unet_" + re.sub(r"\.to_out$", ".to_out.0", rest).replace(".", "_"))
    rest = rest if rest.startswith("text_model.") else f"text_model.{rest}"
    stem = f"{_TEXT_ENCODERS.get(part)}_{rest.replace('.', '_')}"
    return stem if stem in known_stems() else None


_by_diffusers_stem: dict[str, str] = {}


@dataclass(frozen=True)
class _Adapter:
    """What a model's LoraConfig says of scales: the general alpha, None where it names none, and those of patterns."""

    alpha: float | None
    patterns: list[tuple[re.Pattern[str], float]]
    root_of_rank: bool


def _peft_adapters(path: Path, metadata: dict[str, str]) -> dict[str, _Adapter]:
    """The LoraConfigs that diffusers writes into a file since 0.35, by the part of the pipeline."""
    try:
        settings = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        return {part: _Adapter(float(settings[f"{part}.lora_alpha"]) if f"{part}.lora_alpha" in settings else None,
                               [(re.compile(rf"(.*\.)?({pattern})$"), float(alpha))
                                for pattern, alpha in settings.get(f"{part}.alpha_pattern", {}).items()],
                               bool(settings.get(f"{part}.use_rslora"))) for part in ("unet", *_TEXT_ENCODERS)}
    except (ValueError, TypeError, AttributeError, re.error) as error:
        raise RequestError(f"{path}: lora_adapter_metadata in its metadata can't be read ({error}). Save the file anew with "
                           f"diffusers.") from None


def _peft_scale(adapters: dict[str, _Adapter], name: str, rank: int) -> float:
    """As PEFT counts it: the first pattern that fits the name's end goes before the general alpha; without any, 1."""
    part, _, module = name.partition(".")
    adapter = adapters.get(part)
    if adapter is None:
        return 1.0
    general = rank if adapter.alpha is None else adapter.alpha
    alpha = next((alpha for pattern, alpha in adapter.patterns if pattern.match(module)), general)
    return alpha / (math.sqrt(rank) if adapter.root_of_rank else rank)
