"""Puts a LoRA file into a network's layers and turns its strength, so that one U-Net shows many files."""

from collections import defaultdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from crumb.engine.network.lora import Network
from crumb.profiles.errors import CrumbError

DOWN, UP, ALPHA = "lora_down.weight", "lora_up.weight", "alpha"


def put_lora(network: Network, path: Path) -> None:
    """The file's tensors in place of the network's, at strength 1; layers that the file lacks do nothing.

    Rank and alpha are the file's own, layer by layer. Raises CrumbError where the file is damaged or made for other layers.
    """
    modules = read_lora(path)
    unknown = [stem for stem in modules if stem not in network.layers]
    if unknown:
        raise CrumbError(f"{path} changes {unknown[0]} and {len(unknown) - 1} more layers that the run's plan does not train. "
                         f"Is it of another run, or was the plan changed since?")
    for stem, layer in network.layers.items():
        tensors = modules.get(stem)
        if tensors is None:
            layer.lora_B.data.zero_()
            continue
        down, up = tensors[DOWN], tensors[UP]
        if down.shape[1:] != layer.lora_A.shape[1:] or up.shape[0] != layer.lora_B.shape[0] or up.shape[1] != down.shape[0]:
            raise CrumbError(f"{path}: {stem} has the shapes {list(down.shape)} and {list(up.shape)}, which don't fit the "
                             f"base model. Is it made for another one?")
        layer.lora_A.data, layer.lora_B.data = (tensor.to(layer.lora_A) for tensor in (down, up))
        layer.rank = down.shape[0]
        layer.alpha = float(tensors[ALPHA]) if ALPHA in tensors else float(layer.rank)
    set_strength(network, 1.0)


def set_strength(network: Network, strength: float) -> None:
    """What other programs call the LoRA's weight: its change is multiplied by this, and 0 is the base model."""
    for layer in network.layers.values():
        layer.scaling = strength * (layer.alpha / layer.rank)


def read_lora(path: Path) -> dict[str, dict[str, Tensor]]:
    """Per layer stem its `lora_down.weight`, `lora_up.weight` and, where there is one, `alpha`; on the CPU."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CrumbError(f"{path} can't be read ({error}). If the run is still going on, it may have dropped this "
                         f"checkpoint: ask again.") from None
    modules: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        stem, _, kind = key.partition(".")
        modules[stem][kind] = tensor
    for stem, found in modules.items():
        if not {DOWN, UP} <= found.keys() <= {DOWN, UP, ALPHA}:
            raise CrumbError(f"{path}: {stem} holds {', '.join(sorted(found))}, which is no plain LoRA.")
        if not all(torch.isfinite(tensor).all() for tensor in found.values()):
            raise CrumbError(f"{path}: {stem} holds NaN or infinity. `crumb verify {path}` shows more.")
    return modules
