"""Puts a LoRA file into a network's layers and turns its strength, so that one U-Net shows many files."""

from pathlib import Path

from crumb.engine.network.lora import Network
from crumb.engine.network.read import read_lora, require_fit
from crumb.profiles.errors import RequestError


def put_lora(network: Network, path: Path, part: str = "lora_") -> None:
    """The file's tensors in place of the network's, at strength 1; layers that the file lacks do nothing.

    `part`: how the names of the modules begin that are looked at: lora_unet, lora_te, or all.
    Rank and alpha are the file's own, layer by layer. RequestError where the file is damaged or made for other layers.
    """
    changes = {stem: change for stem, change in read_lora(path).items() if stem.startswith(part)}
    unknown = sorted(changes.keys() - network.layers.keys())
    if unknown:
        raise RequestError(f"{path} changes {unknown[0]} and {len(unknown) - 1} more layers that the run's plan does not "
                           f"train. Is it of another run, or was the plan changed since?")
    for stem, layer in network.layers.items():
        if stem not in changes:
            layer.lora_B.data.zero_()
            continue
        require_fit(changes[stem], layer, stem, path)
        layer.lora_A.data, layer.lora_B.data = (tensor.to(layer.lora_A) for tensor in (changes[stem].down, changes[stem].up))
        layer.rank = len(layer.lora_A)
        layer.alpha = changes[stem].scale * layer.rank
    set_strength(network, 1.0)


def set_strength(network: Network, strength: float) -> None:
    """What other programs call the LoRA's weight: its change is multiplied by this, and 0 is the base model."""
    for layer in network.layers.values():
        layer.scaling = strength * (layer.alpha / layer.rank)
