"""A linear layer as the fused operations see it: a frozen weight of any format, with or without a LoRA beside it.

Its products are those of lora_linear.py, lora_linear_int8.py and lora_linear_nf4.py, by the kind of weight.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from crumb.kernels import lora_linear, lora_linear_nf4
from crumb.kernels import lora_linear_int8 as int8
from crumb.kernels.dispatch import uses_triton
from crumb.kernels.lora_linear import (
    FrozenLinearFunction,
    LoRALinearFunction,
    Products,
    down_gradient,
    leave_out,
    sum_over_rows,
)
from crumb.kernels.quantize import Int8Weight, NF4Weight

Weight = Tensor | Int8Weight | NF4Weight


@dataclass(frozen=True, eq=False)
class Layer:
    """weight (N, K), bias (N,); lora_A (R, K) and lora_B (N, R) are None where nothing learns."""

    weight: Weight
    bias: Tensor | None
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    scaling: float = 0.0
    kept: Tensor | None = None
    """(B, tokens or 1, R) bool where dropout acts: which values of x Aᵀ stay in this pass; `scaling` makes up for the rest."""


def loras(layers: list[Layer]) -> list[Tensor | None]:
    """A and B of each layer in turn: what autograd must be shown to give them gradients."""
    return [factor for layer in layers for factor in (layer.lora_A, layer.lora_B)]


def with_masks(layers: list, masks: list[Tensor | None]) -> list:
    """The layers with these for `kept`. Functions hold on to layers without, and save masks as all tensors of a pass."""
    return [layer if layer.kept is kept else replace(layer, kept=kept) for layer, kept in zip(layers, masks)]


def linear(x: Tensor, layer: Layer) -> Tensor:
    """The layer on its own, differentiable in x, A and B."""
    products = products_of(layer.weight)
    if layer.lora_A is None:
        return FrozenLinearFunction.apply(x, layer.weight, layer.bias, products)
    return LoRALinearFunction.apply(x, layer.weight, layer.bias, layer.lora_A, layer.lora_B, layer.scaling, products,
                                    layer.kept)


# Without autograd, for functions with a backward of their own.

def forward(rows: Tensor, layer: Layer) -> tuple[Tensor, Tensor | None]:
    """y (M, N), and x Aᵀ (M, R) for backward."""
    return products_of(layer.weight).forward(rows, layer.weight, layer.bias, layer.lora_A, layer.lora_B, layer.scaling,
                                              layer.kept)


def forward_all(rows: Tensor, layers: list[Layer]) -> list[tuple[Tensor, Tensor | None]]:
    """`forward` of each layer. Kernels of int8 weights share one quantisation, made in the same read of the rows as x Aᵀ."""
    factors = [layer.lora_A for layer in layers if layer.lora_A is not None]
    ranks = [len(lora_A) for lora_A in factors]
    takes_kernels = all(isinstance(layer.weight, Int8Weight) for layer in layers) and uses_triton("lora_linear_int8", rows)
    if not takes_kernels or sum(ranks) > int8.LARGEST_RANK:
        return [forward(rows, layer) for layer in layers]
    quantised, projected = int8.quantise(rows, factor=torch.cat(factors).T if factors else None)
    downs = iter(projected.split(ranks, 1) if factors else ())
    results = []
    for layer in layers:
        down, up = (None, None) if layer.lora_A is None else (leave_out(next(downs), layer.kept), layer.lora_B.T)
        results.append((int8.multiply(quantised, layer.weight.values, layer.weight.scales, layer.bias, down, up,
                                      layer.scaling), down))
    return results


def backward(dy: Tensor, rows: Tensor | None, down: Tensor | None, layer: Layer,
             needs_x: bool = True) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dX, dA and dB; dA is None where `rows` is, and both where there is no LoRA."""
    has_lora = layer.lora_A is not None
    return products_of(layer.weight).backward(dy, rows, down, layer.weight, layer.lora_A, layer.lora_B, layer.scaling,
                                              (needs_x, has_lora and rows is not None, has_lora), layer.kept)


def lora_A_gradient(dy: Tensor, rows: Tensor, layer: Layer) -> Tensor | None:
    """dA alone, where the rows were not at hand for `backward`. Reads dy once more."""
    if layer.lora_A is None:
        return None
    return sum_over_rows(down_gradient(dy, layer.lora_B, layer.scaling, layer.kept), rows).to(layer.lora_A.dtype)


def products_of(weight: Weight) -> Products:
    if isinstance(weight, Int8Weight):
        return int8.PRODUCTS
    return lora_linear_nf4.PRODUCTS if isinstance(weight, NF4Weight) else lora_linear.PRODUCTS
