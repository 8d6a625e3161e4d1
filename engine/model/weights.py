"""Moves tensors from safetensors files into a module, one at a time.

Separate from load.py, which knows what the parts of SDXL are called and how they are built; here is only where
tensors lie and how they are read and placed, with the check that none is missing, foreign or of another shape.

Files are read, not mapped: of a mapped file every page that was touched counts as this process's memory.
"""

import ctypes
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from crumb.engine.model.keys import Source
from crumb.profiles.errors import RequestError
from crumb.profiles.safetensors_header import read_header

# Buffers and training leftovers that some programs save beside the weights.
LEFTOVERS = ("embeddings.position_ids", "logit_scale", "attn_mask", "loss.", "model_ema.")
NUM_NAMED = 5
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I8": torch.int8, "U8": torch.uint8}

TRIM_EVERY_BYTES = 64 * 2**20
"""How many bytes are read between two times that freed memory goes back to the system."""

Arrive = Callable[[str, Tensor], Any]
"""Given the module's name of a tensor and the tensor on the CPU, in memory of its own: what the module gets for it."""

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Stored:
    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str
    start: int
    """Where in the file its bytes begin."""

    @property
    def element_bytes(self) -> int:
        """RequestError for a kind of numbers that no weight is stored in."""
        if self.dtype not in DTYPES:
            raise RequestError(f"{self.file}: tensor {self.key} is stored as {self.dtype}, which is no kind of weight. "
                               f"Choose the fp16, bf16 or fp32 version of this model.")
        return DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Weights:
    """The stored tensors of one part by the module's names."""

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
    stored = {}
    for file in files:
        header, start = read_header(file)[0], data_start(file)
        stored |= {name.removeprefix(prefix): Stored(file, name, tuple(info["shape"]), info["dtype"],
                                                     start + info["data_offsets"][0])
                   for name, info in header.items() if name.startswith(prefix)}
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


def exactly(dtype: torch.dtype, device: torch.device | str) -> Arrive:
    """Tensors as they are, in that dtype on that device."""
    return lambda name, tensor: nn.Parameter(tensor.to(device, dtype).contiguous(), requires_grad=False)


def fill(
    module: nn.Module,
    weights: Weights,
    arrive: Arrive,
    canonical: Callable[[str], str] = str,
    on_progress: OnProgress | None = None,
) -> nn.Module:
    """Gives a module made on the meta device its weights, frozen, and sets eval mode; returns the module.

    `canonical` turns the module's own names into those of `weights`; `on_progress(done_bytes, total_bytes)`, as stored.
    """
    own = {canonical(name): (name, tensor.shape) for name, tensor in module.state_dict().items()}
    _check_names(weights, own.keys())
    in_file_order = sorted(weights.sources.items(), key=lambda item: _position(weights.stored[item[1].key], item[1]))
    done_bytes, total_bytes = 0, sum(torch.Size(shape).numel() * weights.stored[weights.sources[name].key].element_bytes
                                     for name, shape in weights.shapes.items())
    with ExitStack() as stack:
        files = {stored.file for stored in weights.stored.values()}
        opened = {file: stack.enter_context(file.open("rb")) for file in files}
        for name, source in in_file_order:
            own_name, shape = own[name]
            tensor = _read(opened, weights, source)
            # The VAE's attention is stored as 1x1 convolutions and used as linear layers.
            if tensor.shape[: len(shape)] != shape or tensor.numel() != shape.numel():
                raise RequestError(
                    f"{weights.origin}: tensor {weights.stored[source.key].key} has shape {list(tensor.shape)} where "
                    f"{list(shape)} is needed. The file is damaged or of another kind: choose another."
                )
            done_before, done_bytes = done_bytes, done_bytes + tensor.nbytes
            place(module, own_name, arrive(own_name, tensor.reshape(shape)))
            del tensor
            if done_bytes // TRIM_EVERY_BYTES > done_before // TRIM_EVERY_BYTES:
                trim_memory()
            if on_progress:
                on_progress(done_bytes, total_bytes)
    _make_position_ids(module)
    return module.eval()


def _check_names(weights: Weights, needed: set[str]) -> None:
    for what, names in (("lacks", needed - weights.sources.keys()), ("has unknown", weights.sources.keys() - needed)):
        if names:
            listed = ", ".join(sorted(names)[:NUM_NAMED]) + (", ..." if len(names) > NUM_NAMED else "")
            raise RequestError(
                f"{weights.origin} {what} {len(names)} tensors ({listed}). It is damaged or not a plain SDXL model: "
                "fetch it again, or choose another."
            )


def data_start(file: Path) -> int:
    """Where the tensors of a safetensors file begin."""
    with file.open("rb") as opened:
        return 8 + int.from_bytes(opened.read(8), "little")


def read_tensor(file: BinaryIO, start: int, shape: tuple[int, ...], dtype: str) -> Tensor:
    """The tensor whose bytes begin there, in memory of its own. ValueError where it can't be read whole."""
    tensor = torch.empty(shape, dtype=DTYPES[dtype])
    try:
        file.seek(start)
        num_bytes = file.readinto(as_bytes(tensor))
    except OSError as error:
        raise ValueError(error.strerror) from error
    if num_bytes != tensor.nbytes:
        raise ValueError("the file is shorter than its header says")
    return tensor


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def trim_memory() -> None:
    """Gives freed memory back to the system, where malloc is glibc's.

    Freed between tensors that stay, the memory of tensors as they were read is not soon asked for in the same sizes again:
    that was 1 GB beside SDXL's U-Net in int8.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def place(module: nn.Module, name: str, value: Any) -> None:
    """Sets the parameter, buffer or quantised weight of that name."""
    parent_name, _, leaf = name.rpartition(".")
    parent = module.get_submodule(parent_name)
    if not isinstance(value, Tensor) and hasattr(parent, leaf):
        delattr(parent, leaf)  # torch takes nothing but a parameter in a parameter's place
    setattr(parent, leaf, value)


def _position(stored: Stored, source: Source) -> tuple:
    return stored.file, stored.start, source.third or 0


def _read(opened: dict[Path, BinaryIO], weights: Weights, source: Source) -> Tensor:
    stored = weights.stored[source.key]
    shape, start = stored.shape, stored.start
    if source.third is not None:
        shape = (shape[0] // 3, *shape[1:])
        start += source.third * torch.Size(shape).numel() * stored.element_bytes
    try:
        tensor = read_tensor(opened[stored.file], start, shape, stored.dtype)
    except ValueError as error:
        raise RequestError(f"{stored.file}: tensor {stored.key} cannot be read ({error}). Check the disk, and fetch the file "
                           f"again where it is damaged.") from error
    return tensor.T if source.transposed else tensor


def _make_position_ids(module: nn.Module) -> None:
    """CLIP's position_ids are in no state dict, so nothing has filled them."""
    for name, buffer in module.named_buffers():
        if buffer.is_meta and name.endswith("position_ids"):
            device = next(module.parameters()).device
            place(module, name, torch.arange(buffer.shape[-1], device=device).expand(buffer.shape).contiguous())
