"""Adam's two moments in 8 bits each, by blocks of 256 entries; shared by the optimizers over a flat buffer.

Of each entry m (mean of the gradients) and v (mean of their squares), and for each block the scales R and Q in fp32:

    r = √v            R = max r over the block      code c = 255 (r/R)^¼        r̂ = R (c/255)⁴      c in 0…255
    q = m / r̂         Q = max |q| over the block    code k = 127 q/Q            m̂ = r̂ Q k/127       k in -127…127

A value between two codes takes one of both at random, so that it comes out right on average. The random numbers are a hash
of entry and step: the same run gives the same codes.

Why so. v moves by a thousandth a step (β2 = 0.999) while neighbouring codes are 3 % apart or more: rounded to the nearest,
most changes are lost for good and v stays where it once was. And m is kept relative to its own √v because their quotient is
what Adam moves a weight by: it is of order 1 in every entry, however much the entries of a block differ. A v above 0 never
takes code 0, which would leave only ε below the quotient.

Mean error of Adam's update against 32-bit states on the same gradients, and in brackets the error of the way a weight went
over 1,500 steps (drift: 4,000), for β = (0.9, 0.999); sizes of entries within a block log-normal with standard deviation s:

    gradients                                       these codes      bitsandbytes' dynamic codes, nearest
    s = 0.1                                         0.066 (0.041)     0.032 (0.016)
    s = 1, all fall to 5 %                          0.097 (0.067)     0.117 (0.093)
    s = 2, every 64th entry 30 times larger         0.169 (0.111)    27     (16)
    s = 0.7, entries grow and fall, each by itself  0.112 (0.059)     0.412 (0.366)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from crumb.kernels.language import jit, tl

BLOCK = 256
"""Entries that share their scales."""

TOP_V = 255
TOP_M = 127


@dataclass
class Moments:
    """m and v of a flat buffer, (blocks, 256) each: codes with a scale a block, or fp32 as they are."""

    m: Tensor
    v: Tensor
    m_scale: Tensor
    v_scale: Tensor

    @classmethod
    def zeros(cls, num_blocks: int, bits: int, device: torch.device) -> "Moments":
        m_dtype, v_dtype = (torch.int8, torch.uint8) if bits == 8 else (torch.float32, torch.float32)
        num_scales = num_blocks if bits == 8 else 0
        return cls(torch.zeros(num_blocks, BLOCK, dtype=m_dtype, device=device),
                   torch.zeros(num_blocks, BLOCK, dtype=v_dtype, device=device),
                   torch.zeros(num_scales, device=device), torch.zeros(num_scales, device=device))

    @property
    def eight_bit(self) -> bool:
        return self.m.dtype == torch.int8

    def read(self, blocks: slice) -> tuple[Tensor, Tensor]:
        """m and v of some blocks in fp32."""
        if not self.eight_bit:
            return self.m[blocks], self.v[blocks]
        root = _root_of(self.v[blocks].float()) * self.v_scale[blocks, None]
        return root * (self.m[blocks].float() * (1 / TOP_M)) * self.m_scale[blocks, None], root * root

    def write(self, blocks: slice, m: Tensor, v: Tensor, moves: Tensor, seed: Tensor) -> None:
        """Keeps m and v of those blocks that move; `moves` and `seed` hold one value a block, or one for all."""
        new: tuple[Tensor, ...] = (m, v)
        if self.eight_bit:
            index = torch.arange(blocks.start * BLOCK, blocks.stop * BLOCK, dtype=torch.int32, device=m.device)
            new = encode(m, v, noise_bits(index.view(-1, BLOCK), seed.view(-1, 1)))
        for kept, value in zip((self.m, self.v, self.m_scale, self.v_scale), new):
            kept = kept[blocks]
            kept.copy_(torch.where(moves.view(-1, *[1] * (kept.dim() - 1)), value.to(kept.dtype), kept))


def encode(m: Tensor, v: Tensor, bits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes of m and v, still in fp32, and their scales. `bits`: 32 random ones an entry, the lower half m's."""
    root = v.sqrt()
    v_scale = root.amax(1)
    share = root * _inverse(v_scale)[:, None]
    level = (share.sqrt().sqrt() * TOP_V).floor().clamp(max=TOP_V - 1)
    low = _root_of(level)
    code = level + ((share - low) > _upper(bits) * (_root_of(level + 1) - low))
    code = torch.where(share > 0, code.clamp(min=1), 0)
    quotient = m * _inverse(_root_of(code) * v_scale[:, None])
    m_scale = quotient.abs().amax(1)
    m_code = (quotient * (_inverse(m_scale) * TOP_M)[:, None] + _lower(bits)).floor().clamp(-TOP_M, TOP_M)
    return m_code, code, m_scale, v_scale


def _root_of(code: Tensor) -> Tensor:
    """r̂ / R."""
    share = code * (1 / TOP_V)
    return (share * share) * (share * share)


def _inverse(value: Tensor) -> Tensor:
    return torch.where(value > 0, 1 / value, 0)


def noise_bits(index: Tensor, seed: Tensor) -> Tensor:
    """32 random bits an entry, as int32: a hash of its place in the flat buffer and a seed.

    The hash is Chris Wellons' lowbias32 (nullprogram.com, 2018); int32 overflows here as uint32 does in the kernel.
    """
    bits = index + seed.to(torch.int32) * _signed(0x9E3779B9)
    bits = (bits ^ ((bits >> 16) & 0xFFFF)) * _signed(0x7FEB352D)
    bits = (bits ^ ((bits >> 15) & 0x1FFFF)) * _signed(0x846CA68B)
    return bits ^ ((bits >> 16) & 0xFFFF)


def _signed(number: int) -> int:
    return number - (number >> 31 << 32)


def _lower(bits: Tensor) -> Tensor:
    """A number in [0, 1) from the lower half of the bits."""
    return (bits & 0xFFFF).float() * (1 / 65536)


def _upper(bits: Tensor) -> Tensor:
    return ((bits >> 16) & 0xFFFF).float() * (1 / 65536)


@jit
def read_moments(m_ptr, v_ptr, m_scale_ptr, v_scale_ptr, blocks, index, moves, EIGHT_BIT: tl.constexpr):
    """m and v in fp32. `blocks` and `moves` (N,), `index` (N, 256); what does not move is read as 0."""
    m = tl.load(m_ptr + index, mask=moves[:, None], other=0).to(tl.float32)
    v = tl.load(v_ptr + index, mask=moves[:, None], other=0).to(tl.float32)
    if EIGHT_BIT:
        m_scale = tl.load(m_scale_ptr + blocks, mask=moves, other=0)[:, None]
        root = _root(v) * tl.load(v_scale_ptr + blocks, mask=moves, other=0)[:, None]
        m = root * (m * (1 / 127)) * m_scale
        v = root * root
    return m, v


@jit
def write_moments(m_ptr, v_ptr, m_scale_ptr, v_scale_ptr, blocks, index, moves, m, v, bits, EIGHT_BIT: tl.constexpr):
    """The inverse of read_moments; `bits` as hash_bits gives them."""
    if EIGHT_BIT:
        root = tl.sqrt(v)
        v_scale = tl.max(root, 1)
        share = root * _inverse_of(v_scale)[:, None]
        level = tl.minimum(tl.floor(tl.sqrt(tl.sqrt(share)) * 255), 254)
        low = _root(level)
        code = level + ((share - low) > (bits >> 16).to(tl.float32) * (1 / 65536) * (_root(level + 1) - low)).to(tl.float32)
        code = tl.where(share > 0, tl.maximum(code, 1), 0)
        quotient = m * _inverse_of(_root(code) * v_scale[:, None])
        m_scale = tl.max(tl.abs(quotient), 1)
        m_code = tl.floor(quotient * (_inverse_of(m_scale) * 127)[:, None] + (bits & 0xFFFF).to(tl.float32) * (1 / 65536))
        tl.store(m_scale_ptr + blocks, m_scale, mask=moves)
        tl.store(v_scale_ptr + blocks, v_scale, mask=moves)
        # Through int32: straight from fp32 to 8 bits is not the same on every architecture.
        tl.store(v_ptr + index, code.to(tl.int32).to(tl.uint8), mask=moves[:, None])
        tl.store(m_ptr + index, tl.minimum(tl.maximum(m_code, -127), 127).to(tl.int32).to(tl.int8), mask=moves[:, None])
    else:
        tl.store(m_ptr + index, m, mask=moves[:, None])
        tl.store(v_ptr + index, v, mask=moves[:, None])


@jit
def hash_bits(index, seed):
    """noise_bits, as uint32. `index` (N, 256) and `seed` (N, 1) or a scalar."""
    bits = index.to(tl.uint32) + seed.to(tl.uint32) * 0x9E3779B9
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    return bits ^ (bits >> 16)


@jit
def _root(code):
    share = code * (1 / 255)
    return (share * share) * (share * share)


@jit
def _inverse_of(value):
    return tl.where(value > 0, 1 / tl.where(value > 0, value, 1), 0)
