"""GEGLU, the gated activation of a transformer's feed-forward, with the exact (erf) GELU that SDXL was trained with.

    [u | g] = projected           projected (..., 2d), hidden u and gate g (..., d)
    h = u · gelu(g)               gelu(g) = g Φ(g)

Gradients, from dh (..., d):

    du = dh · gelu(g)             d_projected = [du | dg]
    dg = dh · u · gelu'(g)        gelu'(g) = Φ(g) + g φ(g)

Φ and φ are the distribution function and the density of the standard normal. Only `projected` is kept for backward,
which gives h again from the same read: the LoRA on the following linear layer needs it.

`Int8Projection` may be kept instead, 8.25 bits a number:

    scale = max |v| / 127         over 64 neighbouring v of one row, for u and g alone, fp16
    code = round(v / scale)       gates below -5 count as -5: gelu and its slope are under 1e-5 there

Arithmetic is fp32 inside, results have the dtype of `projected`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from crumb.kernels.dispatch import uses_triton
from crumb.kernels.language import cdiv, jit, tl
from crumb.kernels.launch import Launch, launch_on

SCALE_BLOCK = 64
"""Columns that share a scale: 3 % more bytes than codes alone. Where a few columns are large, d_projected is 1-2 % off;
one scale a row makes that 12-17 % (tests/kernels/test_geglu.py measures both)."""
LOWEST_GATE = -5.0
LARGEST_SCALE = 65504.0


@dataclass(frozen=True)
class Int8Projection:
    """`projected` in 8 bits: codes int8 (..., 2d), scales fp16 (..., 2, ceil(d / 64))."""

    codes: Tensor
    scales: Tensor

    @property
    def num_bytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes


def geglu(projected: Tensor) -> Tensor:
    """h as above, differentiable; keeps only `projected`."""
    return _GEGLU.apply(projected)


class _GEGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, projected):
        ctx.save_for_backward(projected)
        return geglu_forward(projected)

    @staticmethod
    @once_differentiable
    def backward(ctx, dh):
        return geglu_backward(dh, *ctx.saved_tensors)[0]


# Without autograd, for functions with a backward of their own.

def geglu_forward(projected: Tensor) -> Tensor:
    """h."""
    return _forward_triton(projected) if uses_triton("geglu", projected) else _forward_plain(projected)


def geglu_backward(dh: Tensor, projected: Tensor) -> tuple[Tensor, Tensor]:
    """d_projected and h."""
    backward = _backward_triton if uses_triton("geglu", projected) else _backward_plain
    return backward(dh, projected)


def geglu_forward_int8(projected: Tensor) -> tuple[Tensor, Int8Projection]:
    """h of the exact `projected`, and what to keep in its place."""
    forward = _forward_int8_triton if uses_triton("geglu", projected) else _forward_int8_plain
    return forward(projected)


def geglu_backward_int8(dh: Tensor, kept: Int8Projection) -> tuple[Tensor, Tensor]:
    """d_projected and h as the kept codes give them, in dh's dtype."""
    backward = _backward_int8_triton if uses_triton("geglu", dh) else _backward_int8_plain
    return backward(dh, kept)


# Triton. One program computes BLOCK columns of one row.

@jit
def _gelu(gate):
    """gelu and its slope."""
    below = 0.5 + 0.5 * tl.erf(gate * 0.7071067811865476)
    density = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    return gate * below, below + gate * density


@jit
def forward_kernel(projected, h, d, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < d
    hidden = tl.load(projected + row * 2 * d + columns, inside, 0.0).to(tl.float32)
    gate = tl.load(projected + (row * 2 + 1) * d + columns, inside, 0.0).to(tl.float32)
    activated, _ = _gelu(gate)
    tl.store(h + row * d + columns, (hidden * activated).to(h.dtype.element_ty), inside)


@jit
def _store_gradients(dh, hidden, gate, d_projected, h, row, d, columns, inside):
    activated, slope = _gelu(gate)
    dtype = h.dtype.element_ty
    tl.store(d_projected + row * 2 * d + columns, (dh * activated).to(dtype), inside)
    tl.store(d_projected + (row * 2 + 1) * d + columns, (dh * hidden * slope).to(dtype), inside)
    tl.store(h + row * d + columns, (hidden * activated).to(dtype), inside)


@jit
def backward_kernel(dh, projected, d_projected, h, d, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < d
    hidden = tl.load(projected + row * 2 * d + columns, inside, 0.0).to(tl.float32)
    gate = tl.load(projected + (row * 2 + 1) * d + columns, inside, 0.0).to(tl.float32)
    dh = tl.load(dh + row * d + columns, inside, 0.0).to(tl.float32)
    _store_gradients(dh, hidden, gate, d_projected, h, row, d, columns, inside)


@jit
def _scale_blocks(d, BLOCK: tl.constexpr, SCALE_BLOCK: tl.constexpr):
    """This program's blocks (BLOCK / SCALE_BLOCK, 1) and their columns (BLOCK / SCALE_BLOCK, SCALE_BLOCK)."""
    blocks = tl.program_id(1) * (BLOCK // SCALE_BLOCK) + tl.arange(0, BLOCK // SCALE_BLOCK)[:, None]
    columns = blocks * SCALE_BLOCK + tl.arange(0, SCALE_BLOCK)[None, :]
    return blocks, columns, columns < d


@jit
def _quantise(values, largest_scale):
    """Codes int8, and fp16 scales of the rows of `values`."""
    largest = tl.max(tl.abs(values), axis=1, keep_dims=True)
    scale = tl.minimum(largest / 127.0, largest_scale).to(tl.float16)
    divisor = tl.where(scale > 0.0, scale.to(tl.float32), 1.0)
    codes = tl.floor(values / divisor + 0.5)
    return tl.minimum(tl.maximum(codes, -127.0), 127.0).to(tl.int8), scale


@jit
def forward_int8_kernel(projected, h, codes, scales, d, num_blocks, lowest_gate, largest_scale,
                        BLOCK: tl.constexpr, SCALE_BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    blocks, columns, inside = _scale_blocks(d, BLOCK, SCALE_BLOCK)
    hidden = tl.load(projected + row * 2 * d + columns, inside, 0.0).to(tl.float32)
    gate = tl.load(projected + (row * 2 + 1) * d + columns, inside, 0.0).to(tl.float32)
    activated, _ = _gelu(gate)
    tl.store(h + row * d + columns, (hidden * activated).to(h.dtype.element_ty), inside)
    hidden_codes, hidden_scale = _quantise(hidden, largest_scale)
    gate_codes, gate_scale = _quantise(tl.maximum(gate, lowest_gate), largest_scale)
    tl.store(codes + row * 2 * d + columns, hidden_codes, inside)
    tl.store(codes + (row * 2 + 1) * d + columns, gate_codes, inside)
    tl.store(scales + row * 2 * num_blocks + blocks, hidden_scale, blocks < num_blocks)
    tl.store(scales + (row * 2 + 1) * num_blocks + blocks, gate_scale, blocks < num_blocks)


@jit
def backward_int8_kernel(dh, codes, scales, d_projected, h, d, num_blocks,
                         BLOCK: tl.constexpr, SCALE_BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    blocks, columns, inside = _scale_blocks(d, BLOCK, SCALE_BLOCK)
    hidden_scale = tl.load(scales + row * 2 * num_blocks + blocks, blocks < num_blocks, 0.0).to(tl.float32)
    gate_scale = tl.load(scales + (row * 2 + 1) * num_blocks + blocks, blocks < num_blocks, 0.0).to(tl.float32)
    hidden = tl.load(codes + row * 2 * d + columns, inside, 0).to(tl.float32) * hidden_scale
    gate = tl.load(codes + (row * 2 + 1) * d + columns, inside, 0).to(tl.float32) * gate_scale
    dh = tl.load(dh + row * d + columns, inside, 0.0).to(tl.float32)
    _store_gradients(dh, hidden, gate, d_projected, h, row, d, columns, inside)


def _forward_triton(projected: Tensor) -> Tensor:
    projected = projected.contiguous()
    h = _empty_h(projected)
    grid, launch = _grid_and_launch(h, "geglu")
    forward_kernel[grid](projected, h, h.shape[-1], **launch.options())
    return h


def _backward_triton(dh: Tensor, projected: Tensor) -> tuple[Tensor, Tensor]:
    dh, projected = dh.contiguous(), projected.contiguous()
    d_projected, h = torch.empty_like(projected), _empty_h(projected)
    grid, launch = _grid_and_launch(h, "geglu")
    backward_kernel[grid](dh, projected, d_projected, h, h.shape[-1], **launch.options())
    return d_projected, h


def _forward_int8_triton(projected: Tensor) -> tuple[Tensor, Int8Projection]:
    projected = projected.contiguous()
    h, codes = _empty_h(projected), torch.empty_like(projected, dtype=torch.int8)
    num_blocks = cdiv(h.shape[-1], SCALE_BLOCK)
    scales = projected.new_empty(*h.shape[:-1], 2, num_blocks, dtype=torch.float16)
    grid, launch = _grid_and_launch(h, "geglu int8")
    forward_int8_kernel[grid](projected, h, codes, scales, h.shape[-1], num_blocks, LOWEST_GATE, LARGEST_SCALE,
                              SCALE_BLOCK=SCALE_BLOCK, **launch.options())
    return h, Int8Projection(codes, scales)


def _backward_int8_triton(dh: Tensor, kept: Int8Projection) -> tuple[Tensor, Tensor]:
    dh = dh.contiguous()
    d_projected, h = torch.empty_like(kept.codes, dtype=dh.dtype), torch.empty_like(dh)
    grid, launch = _grid_and_launch(h, "geglu int8")
    backward_int8_kernel[grid](dh, kept.codes, kept.scales, d_projected, h, h.shape[-1], kept.scales.shape[-1],
                               SCALE_BLOCK=SCALE_BLOCK, **launch.options())
    return d_projected, h


def _empty_h(projected: Tensor) -> Tensor:
    return projected.new_empty(*projected.shape[:-1], projected.shape[-1] // 2)


def _grid_and_launch(h: Tensor, config: str) -> tuple[tuple[int, int], Launch]:
    launch, width = launch_on(config, h.device), h.shape[-1]
    return (h.numel() // width, cdiv(width, launch.blocks["BLOCK"])), launch


# Plain torch. Results are written in place wherever that spares a temporary.

@torch.no_grad()
def _forward_plain(projected: Tensor) -> Tensor:
    hidden, gate = projected.chunk(2, dim=-1)
    return F.gelu(gate).mul_(hidden)


@torch.no_grad()
def _backward_plain(dh: Tensor, projected: Tensor) -> tuple[Tensor, Tensor]:
    hidden, gate = projected.chunk(2, dim=-1)
    d_projected = torch.empty_like(projected)
    d_hidden, d_gate = d_projected.chunk(2, dim=-1)
    activated = F.gelu(gate)
    torch.mul(dh, activated, out=d_hidden)
    torch.mul(dh, hidden, out=d_gate)
    torch.ops.aten.gelu_backward.grad_input(d_gate, gate, grad_input=d_gate)
    return d_projected, activated.mul_(hidden)


@torch.no_grad()
def _forward_int8_plain(projected: Tensor) -> tuple[Tensor, Int8Projection]:
    hidden, gate = projected.chunk(2, dim=-1)
    codes = torch.empty_like(projected, dtype=torch.int8, memory_format=torch.contiguous_format)
    hidden_codes, gate_codes = codes.chunk(2, dim=-1)
    scales = torch.stack([_quantise_plain(hidden, hidden_codes),
                          _quantise_plain(gate.clamp(min=LOWEST_GATE), gate_codes)], dim=-2)
    return _forward_plain(projected), Int8Projection(codes, scales)


def _quantise_plain(values: Tensor, codes: Tensor) -> Tensor:
    """Writes the codes, returns the scales."""
    width = values.shape[-1]
    blocks = F.pad(values, (0, -width % SCALE_BLOCK)).unflatten(-1, (-1, SCALE_BLOCK))
    scales = (blocks.abs().amax(-1).float() / 127).clamp_(max=LARGEST_SCALE).half()
    divisor = torch.where(scales > 0, scales.float(), 1.0).unsqueeze(-1)
    rounded = (blocks / divisor).round_().clamp_(-127, 127)
    codes.copy_(rounded.flatten(-2)[..., :width])
    return scales


@torch.no_grad()
def _backward_int8_plain(dh: Tensor, kept: Int8Projection) -> tuple[Tensor, Tensor]:
    projected = torch.empty_like(kept.codes, dtype=dh.dtype)
    for values, codes, scales in zip(projected.chunk(2, -1), kept.codes.chunk(2, -1), kept.scales.float().unbind(-2)):
        torch.mul(codes, scales.repeat_interleave(SCALE_BLOCK, dim=-1)[..., :codes.shape[-1]], out=values)
    return _backward_plain(dh, projected)
