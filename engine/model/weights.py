"""Moves tensors from safetensors files into a module, one at a time.

Separate from load.py, which knows what the parts of SDXL are called and how they are built; here is only where
tensors lie and how they are placed, with the check that none is missing, foreign or of another shape.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from crumb.engine.model.keys import Source
from crumb.profiles.errors import RequestError
from crumb.profiles.safetensors_header import read_header

# Buffers and training leftovers that some programs save beside the weights.
LEFTOVERS = ("embeddings.position_ids", "logit_scale", "attn_mask", "loss.", "model_ema.")
NUM_NAMED = 5


@dataclass(frozen=True)
class Stored:
    file: Path
    key: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Weights:
    """The stored tensors of one part, in file order, by the module's names."""

    origin: Path
    sources: dict[str, Source]
    stored: dict[str, Stored]  # by Source.key

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes as the module's: thirds taken, transposed."""
        return {name: self._shape(source) for name, source in self.sources.items()}

    def _shape(self, source: Source) -> tuple[int, ...]:
        shape = self.stored[source.key].shape
        if source.third is not None:
            return (shape[0] // 3, *shape[1:])
        return shape[::-1] if source.transposed else shape


def find_weights(origin: Path, files: list[Path], prefix: str, sources: Callable[[str], dict[str, Source]]) -> Weights:
    """The tensors under `prefix`; `sources` gives what a key (without prefix) holds, ValueError for a foreign one."""
    stored = {
        name.removeprefix(prefix): Stored(file, name, tuple(info["shape"]))
        for file in files
        for name, info in read_header(file)[0].items()
        if name.startswith(prefix)
    }
    found: dict[str, Source] = {}
    for key in stored:
        if key.startswith(LEFTOVERS) or key.endswith(LEFTOVERS):
            continue
        try:
            found |= sources(key)
        except ValueError:
            # Kept under its own name, so that `fill` reports it.
            found[key] = Source(key)
    return Weights(origin, found, stored)


def fill(
    module: nn.Module,
    weights: Weights,
    dtype: torch.dtype,
    device: torch.device | str,
    canonical: Callable[[str], str] = str,
) -> nn.Module:
    """Gives a module made on the meta device its weights, frozen, and sets eval mode; returns the module.

    `canonical` turns the module's own names into those of `weights`.
    """
    own = {canonical(name): (name, tensor.shape) for name, tensor in module.state_dict().items()}
    _check_names(weights, own.keys())
    with ExitStack() as stack:
        files = {stored.file for stored in weights.stored.values()}
        handles = {file: stack.enter_context(safe_open(file, framework="pt")) for file in files}
        for name, source in weights.sources.items():
            own_name, shape = own[name]
            tensor = _read(handles, weights, source)
            # The VAE's attention is stored as 1x1 convolutions and used as linear layers.
            if tensor.shape[: len(shape)] != shape or tensor.numel() != shape.numel():
                raise RequestError(
                    f"{weights.origin}: tensor {weights.stored[source.key].key} has shape {list(tensor.shape)} where "
                    f"{list(shape)} is needed. The file is damaged or of another kind: choose another."
                )
            # A copy in any case: what safetensors gives is a view of the file, which may change or vanish.
            copy = tensor.reshape(shape).to(device, dtype, copy=True).contiguous()
            _place(module, own_name, nn.Parameter(copy, requires_grad=False))
    _make_position_ids(module, device)
    return module.eval()


def _check_names(weights: Weights, needed: set[str]) -> None:
    for what, names in (("lacks", needed - weights.sources.keys()), ("has unknown", weights.sources.keys() - needed)):
        if names:
            listed = ", ".join(sorted(names)[:NUM_NAMED]) + (", ..." if len(names) > NUM_NAMED else "")
            raise RequestError(
                f"{weights.origin} {what} {len(names)} tensors ({listed}). It is damaged or not a plain SDXL model: "
                "fetch it again, or choose another."
            )


def _read(handles: dict, weights: Weights, source: Source) -> torch.Tensor:
    stored = weights.stored[source.key]
    if source.third is not None:
        rows = stored.shape[0] // 3
        return handles[stored.file].get_slice(stored.key)[source.third * rows : (source.third + 1) * rows]
    tensor = handles[stored.file].get_tensor(stored.key)
    return tensor.T if source.transposed else tensor


def _place(module: nn.Module, name: str, value: nn.Parameter | torch.Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, value)


def _make_position_ids(module: nn.Module, device: torch.device | str) -> None:
    """CLIP's position_ids are in no state dict, so nothing has filled them."""
    for name, buffer in module.named_buffers():
        if buffer.is_meta and name.endswith("position_ids"):
            _place(module, name, torch.arange(buffer.shape[-1], device=device).expand(buffer.shape).contiguous())
