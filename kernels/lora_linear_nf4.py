"""A frozen linear layer whose weight is NF4, with a LoRA beside it.

    W[i] = a[i // 64] · C[c[i]]       (N, K), an NF4Weight: quantize.py
    y = x Wᵀ + b + c · s Bᵀ,  s = x Aᵀ       and the gradients as in lora_linear.py

The weight is dequantised to x's dtype before each product, forward and again backward, into one buffer that all
such layers use in turn. The kernel writes what the product then reads: 26 MB at the most, a few percent of a step. To
multiply from 4 bits at once would save that, but has to come within a few percent of cuBLAS to gain anything.
"""

import torch
from torch import Tensor

from crumb.kernels import lora_linear as linear16
from crumb.kernels.dispatch import uses_triton
from crumb.kernels.language import cdiv, jit, tl
from crumb.kernels.launch import launch_on
from crumb.kernels.lora_linear import LoRALinearFunction, Needs, Products
from crumb.kernels.quantize import NF4_BLOCK, NF4_GROUP, NF4Weight, nf4_codes, weight_buffer


def lora_linear_nf4(x: Tensor, weight: NF4Weight, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor,
                    scaling: float) -> Tensor:
    """y as above, in x's dtype. x may have any number of leading dimensions; weight and bias are frozen."""
    return LoRALinearFunction.apply(x, weight, bias, lora_A, lora_B, scaling, PRODUCTS)


def forward(rows: Tensor, weight: NF4Weight, bias: Tensor | None, lora_A: Tensor | None, lora_B: Tensor | None,
            scaling: float, kept: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """y (M, N), and s = x Aᵀ (M, R) for backward; A and B are None for a layer without a LoRA."""
    return linear16.forward(rows, dequantise(weight, rows.dtype), bias, lora_A, lora_B, scaling, kept)


def backward(dy: Tensor, rows: Tensor | None, down: Tensor | None, weight: NF4Weight, lora_A: Tensor | None,
             lora_B: Tensor | None, scaling: float, needs: Needs,
             kept: Tensor | None = None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dX, dA and dB, as far as they are needed; `rows` is only read for dA and `down` only for dB."""
    dense = dequantise(weight, dy.dtype) if needs[0] else None
    return linear16.backward(dy, rows, down, dense, lora_A, lora_B, scaling, needs, kept)


PRODUCTS = Products(forward, backward)


def dequantise(weight: NF4Weight, dtype: torch.dtype) -> Tensor:
    """The weight in the shared buffer: gone at the next call."""
    out = weight_buffer(weight.shape, dtype, weight.codes.device)
    if not uses_triton("lora_linear_nf4", out):
        return weight.dequantised(dtype, out)
    launch = launch_on("nf4_dequantise", out.device)
    dequantise_kernel[(cdiv(len(weight.codes), launch.blocks["BLOCK"]),)](
        weight.codes, weight.block_codes, weight.group_ranges, nf4_codes(out.device), out, out.numel(),
        NF4_BLOCK=NF4_BLOCK, NF4_GROUP=NF4_GROUP, **launch.options())
    return out


@jit
def dequantise_kernel(codes, block_codes, group_ranges, table, out, num_weights,
                      BLOCK: tl.constexpr, NF4_BLOCK: tl.constexpr, NF4_GROUP: tl.constexpr):
    byte = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = byte * 2 < num_weights
    packed = tl.load(codes + byte, inside, 0).to(tl.int32)
    block = byte // (NF4_BLOCK // 2)
    group = block // NF4_GROUP
    lowest = tl.load(group_ranges + group * 2, inside, 0.0)
    step = tl.load(group_ranges + group * 2 + 1, inside, 0.0)
    scale = lowest + step * tl.load(block_codes + block, inside, 0).to(tl.float32)
    values = tl.interleave(tl.load(table + (packed >> 4)) * scale, tl.load(table + (packed & 15)) * scale)
    weight = tl.program_id(0) * BLOCK * 2 + tl.arange(0, BLOCK * 2)
    tl.store(out + weight, values, weight < num_weights)
