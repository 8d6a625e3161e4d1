"""GroupNorm, SiLU and the convolution that reads them, as one node that keeps only what it was given.

    a = SiLU(GroupNorm(x))                       x (B, C, H, W)
    y = conv(a, W) + b + c · conv1x1(down, B)    down = conv(a, A), with or without a LoRA, less what dropout leaves out

Kept for backward: x, two numbers per group, and `down` where there is a LoRA. a is made again from x, and only for dA.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

from crumb.kernels.conv import Pair, dense
from crumb.kernels.group_norm_silu import group_norm_silu_again, group_norm_silu_backward, group_norm_silu_forward
from crumb.kernels.linear import with_masks
from crumb.kernels.norm_linears import Norm
from crumb.kernels.quantize import Int8Weight


@dataclass(frozen=True, eq=False)
class ConvLayer:
    """weight (O, I, kh, kw), bias (O,); lora_A (R, I, kh, kw) and lora_B (O, R, 1, 1) are None where nothing learns."""

    weight: Tensor | Int8Weight
    bias: Tensor | None
    stride: Pair
    padding: Pair
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    scaling: float = 0.0
    kept: Tensor | None = None
    """Bool, over `down` (B, R, H, W): which of its values stay in this pass, as in linear.Layer."""


def norm_conv(x: Tensor, norm: Norm, layer: ConvLayer) -> Tensor:
    """y as above, in x's dtype and memory format."""
    return _NormConv.apply(x, norm, layer, layer.lora_A, layer.lora_B)


class _NormConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, norm, layer, lora_A, lora_B):
        activated, mean, rstd = group_norm_silu_forward(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
        y = F.conv2d(activated, dense(layer.weight, x), layer.bias, layer.stride, layer.padding)
        down = None
        if lora_A is not None:
            down = F.conv2d(activated, lora_A.to(x.dtype), None, layer.stride, layer.padding)
            if layer.kept is not None:
                down.mul_(layer.kept)
            y.add_(F.conv2d(down, lora_B.to(x.dtype)), alpha=layer.scaling)
        ctx.save_for_backward(x, mean, rstd, down, layer.kept)
        ctx.norm, (ctx.layer,) = norm, with_masks([layer], [None])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, mean, rstd, down, kept = ctx.saved_tensors
        norm, layer = ctx.norm, ctx.layer
        stride, padding = layer.stride, layer.padding
        d_activated = d_lora_A = d_lora_B = None
        if ctx.needs_input_grad[0]:
            d_activated = conv2d_input(x.shape, dense(layer.weight, dy), dy, stride, padding)
        if layer.lora_A is not None:
            lora_A, lora_B = layer.lora_A.to(dy.dtype), layer.lora_B.to(dy.dtype)
            d_down = conv2d_input(down.shape, lora_B, dy).mul_(layer.scaling)
            if kept is not None:
                d_down.mul_(kept)
            d_lora_B = conv2d_weight(down, lora_B.shape, dy).mul_(layer.scaling).to(layer.lora_B.dtype)
            activated = group_norm_silu_again(x, mean, rstd, norm.weight, norm.bias)
            d_lora_A = conv2d_weight(activated, lora_A.shape, d_down, stride, padding).to(layer.lora_A.dtype)
            del activated
            if d_activated is not None:
                d_activated.add_(conv2d_input(x.shape, lora_A, d_down, stride, padding))
        dx = None
        if d_activated is not None:
            dx = group_norm_silu_backward(d_activated, x, mean, rstd, norm.weight, norm.bias)
        return dx, None, None, d_lora_A, d_lora_B
