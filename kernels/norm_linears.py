"""LayerNorm and the linears that read it (q, k and v, or q alone), as one node that keeps only what it was given.

    n   = LayerNorm(x)                        x (..., K)
    y_i = n W_iᵀ + b_i + c_i (n A_iᵀ) B_iᵀ    (..., N_i), with or without a LoRA

Kept for backward: x, which the residual stream holds anyway, two numbers per row and n A_iᵀ. n is made again from x.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from crumb.kernels import linear
from crumb.kernels.layer_norm import layer_norm_again, layer_norm_backward, layer_norm_forward
from crumb.kernels.linear import Layer, with_masks
from crumb.kernels.lora_linear import as_rows


@dataclass(frozen=True)
class Norm:
    """A frozen normalisation; `num_groups` where it is a GroupNorm."""

    weight: Tensor
    bias: Tensor
    eps: float
    num_groups: int = 0


def norm_linears(x: Tensor, norm: Norm, layers: list[Layer]) -> tuple[Tensor, ...]:
    """y_i as above, in x's dtype."""
    return _NormLinears.apply(x, norm, layers, *linear.loras(layers))


class _NormLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, norm, layers, *loras):
        rows = as_rows(x)
        normed, mean, rstd = layer_norm_forward(rows, norm.weight, norm.bias, norm.eps)
        outputs, downs = zip(*linear.forward_all(normed, layers))
        ctx.save_for_backward(x, mean, rstd, *downs, *(layer.kept for layer in layers))
        ctx.norm, ctx.layers = norm, with_masks(layers, [None] * len(layers))
        ctx.set_materialize_grads(False)
        return tuple(y.view(*x.shape[:-1], -1) for y in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        x, mean, rstd, *of_layers = ctx.saved_tensors
        downs, masks = of_layers[:len(ctx.layers)], of_layers[len(ctx.layers):]
        rows = as_rows(x)
        normed, d_normed, d_loras = None, None, []
        if any(ctx.needs_input_grad[3:]):
            normed = layer_norm_again(rows, mean, rstd, ctx.norm.weight, ctx.norm.bias)
        for dy, down, layer in zip(dys, downs, with_masks(ctx.layers, masks)):
            if dy is None:
                d_loras += [None, None]
                continue
            d_rows, d_lora_A, d_lora_B = linear.backward(as_rows(dy), normed, down, layer,
                                                         ctx.needs_input_grad[0])
            d_loras += [d_lora_A, d_lora_B]
            if ctx.needs_input_grad[0]:
                d_normed = d_rows if d_normed is None else d_normed.add_(d_rows)
        dx = None
        if d_normed is not None:
            dx = layer_norm_backward(d_normed, rows, mean, rstd, ctx.norm.weight).view_as(x)
        return dx, None, None, *d_loras
