"""crumb's own formats of frozen weights, for a weight W whose rows are output features (or output channels).

Int8Weight: W[n, k] ≈ s[n] · Q[n, k]           Q int8, s (N,) fp32 = largest |W[n, :]| / 127
NF4Weight:  W[i]    ≈ a[i // 64] · C[c[i]]     i counts the weights in row-major order
            a[j]    = lowest[j // 256] + step[j // 256] · u[j]
            c 4 bit, two a byte, the first in the high half; u uint8; C the 16 codes of NormalFloat
            (Dettmers et al. 2023, "QLoRA", sections 3 and appendix E); 0.5 + 1/64 + 8/16384 bytes a weight

A scale per row rather than per matrix: rows differ in size by a few times and a few are far larger, so one scale
for all costs 3 to 7 times the error (benchmarks/rounding.py). It serves both directions: y = x Wᵀ multiplies column n
of the result by s[n], and dX = dy W takes s[n] into dy before dy is quantised (lora_linear_int8.py).

Quantising works through a weight in pieces, so that it takes a few MB beside the weight and the result.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

INT8_LARGEST = 127
PIECE = 1 << 18
"""How many weights are quantised at a time."""

NF4_BLOCK = 64
NF4_GROUP = 256
NF4_CODES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)

TINY = 1e-30
"""Keeps a division by the scale of nothing but zeros finite."""


@dataclass(eq=False)
class Int8Weight:
    values: Tensor
    """int8, of the weight's shape: (N, K) of a linear layer, (N, in, kh, kw) of a convolution."""
    scales: Tensor
    """(N,) fp32."""

    @classmethod
    @torch.no_grad()
    def of(cls, weight: Tensor) -> "Int8Weight":
        values = torch.empty_like(weight, dtype=torch.int8)
        scales = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
        num_rows = max(1, PIECE // weight[0].numel())
        for first in range(0, len(weight), num_rows):
            rows = slice(first, first + num_rows)
            piece = weight[rows].float()
            largest = piece.flatten(1).abs().amax(1)
            _refuse_not_finite(largest)
            scales[rows] = largest / INT8_LARGEST
            values[rows] = (piece / _per_row(scales[rows], piece).clamp_min(TINY)).round_()
        return cls(values, scales)

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def num_bytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes

    def to(self, device: torch.device | str) -> "Int8Weight":
        return Int8Weight(self.values.to(device), self.scales.to(device))

    def dequantised(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """In the memory format of `values`; `out` is a contiguous tensor of the weight's shape."""
        out = torch.empty_like(self.values, dtype=dtype) if out is None else out
        return torch.mul(self.values, _per_row(self.scales, self.values), out=out)


@dataclass(eq=False)
class NF4Weight:
    codes: Tensor
    """uint8, half as many as weights, whole blocks."""
    block_codes: Tensor
    """uint8: the largest magnitude of each block, as a step above the lowest of its group."""
    group_ranges: Tensor
    """(groups, 2) fp32: the lowest and the step of every group of blocks."""
    shape: torch.Size

    @classmethod
    @torch.no_grad()
    def of(cls, weight: Tensor) -> "NF4Weight":
        flat = weight.reshape(-1)
        pieces = [_nf4(piece) for piece in flat.split(PIECE)]  # a whole number of groups each, save the last
        return cls(*(torch.cat(part) for part in zip(*pieces)), weight.shape)

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def num_bytes(self) -> int:
        return self.codes.nbytes + self.block_codes.nbytes + self.group_ranges.nbytes

    def to(self, device: torch.device | str) -> "NF4Weight":
        return replace(self, codes=self.codes.to(device), block_codes=self.block_codes.to(device),
                       group_ranges=self.group_ranges.to(device))

    def dequantised(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """By plain torch; `out` is a contiguous tensor of the weight's shape."""
        out = torch.empty(self.shape, dtype=dtype, device=self.codes.device) if out is None else out
        table = nf4_codes(self.codes.device)
        for first, piece in zip(range(0, out.numel(), PIECE), out.view(-1).split(PIECE)):
            blocks = slice(first // NF4_BLOCK, (first + PIECE) // NF4_BLOCK)
            packed = self.codes[first // 2:(first + PIECE) // 2]
            values = table[torch.stack((packed >> 4, packed & 15), 1).int()].view(-1, NF4_BLOCK)
            values *= _block_scales(self.block_codes[blocks], self.group_ranges[first // (NF4_BLOCK * NF4_GROUP):])[:, None]
            piece.copy_(values.view(-1)[:len(piece)])
        return out


_NF4_TABLES: dict[torch.device, Tensor] = {}


def nf4_codes(device: torch.device) -> Tensor:
    """The 16 codes as an fp32 tensor, made once for every device."""
    if device not in _NF4_TABLES:
        _NF4_TABLES[device] = torch.tensor(NF4_CODES, dtype=torch.float32, device=device)
    return _NF4_TABLES[device]


def _nf4(piece: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """codes, block_codes and group_ranges of consecutive weights. The codes are chosen for the scales as they are kept."""
    blocks = F.pad(piece.float(), (0, -len(piece) % NF4_BLOCK)).view(-1, NF4_BLOCK)
    largest = blocks.abs().amax(1)
    _refuse_not_finite(largest)
    whole = torch.cat((largest, largest[-1:].expand(-len(largest) % NF4_GROUP))).view(-1, NF4_GROUP)
    lowest, highest = whole.aminmax(dim=1)
    ranges = torch.stack((lowest, (highest - lowest) / 255), 1)
    block_codes = ((whole - lowest[:, None]) / ranges[:, 1:].clamp_min(TINY)).round_().view(-1)[:len(largest)].byte()

    nearest = _nearest_codes(blocks / _block_scales(block_codes, ranges)[:, None].clamp_min(TINY)).view(-1, 2)
    return nearest[:, 0] << 4 | nearest[:, 1], block_codes, ranges


def _nearest_codes(scaled: Tensor) -> Tensor:
    """Of each value, in uint8, which of the 16 codes is nearest: how many of the middles between them lie below it."""
    table = nf4_codes(scaled.device)
    middles = (table[1:] + table[:-1]) / 2
    if scaled.device.type != "cpu":
        return torch.bucketize(scaled, middles, out_int32=True).byte()
    # A binary search for each value takes a processor three times as long as fifteen comparisons of all.
    nearest = torch.zeros(scaled.shape, dtype=torch.uint8)
    is_above = torch.empty(scaled.shape, dtype=torch.bool)
    for middle in middles.tolist():
        nearest += torch.gt(scaled, middle, out=is_above).view(torch.uint8)
    return nearest


def _block_scales(block_codes: Tensor, group_ranges: Tensor) -> Tensor:
    lowest, step = group_ranges.repeat_interleave(NF4_GROUP, 0)[:len(block_codes)].unbind(1)
    return lowest + step * block_codes


def _per_row(scales: Tensor, values: Tensor) -> Tensor:
    return scales.view(-1, *[1] * (values.dim() - 1))


def _refuse_not_finite(largest: Tensor) -> None:
    if not torch.isfinite(largest).all():
        raise ValueError("the weight holds values that are not finite")


_BUFFERS: dict[tuple[torch.device, torch.dtype], Tensor] = {}


def weight_buffer(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A place for one dequantised weight: the same memory at every call, grown to the largest weight so far.

    Only one such weight may be in use at a time. That holds because a layer dequantises, multiplies and is done within
    one stream, and keeps nothing of it for backward. Whoever captures a CUDA graph asks for the largest weight first,
    so that the memory stays where the graph found it.
    """
    numel = shape.numel()
    buffer = _BUFFERS.get((device, dtype))
    if buffer is None or len(buffer) < numel:
        _BUFFERS.pop((device, dtype), None)
        del buffer
        buffer = _BUFFERS[device, dtype] = torch.empty(numel, dtype=dtype, device=device)
    return buffer[:numel].view(shape)
