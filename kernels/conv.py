"""A frozen convolution that keeps nothing for backward, with its weight in 16 bit or in int8.

    y = x ⋆ W + b        x (B, I, H, W), W (O, I, kh, kw), b (O,)
    dx = dy ⋆ᵀ W         needs the shape of x, not x

torch's own convolution keeps x although W needs no gradient. An int8 weight (one scale an output channel) is dequantised
to x's dtype at each use.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from crumb.kernels.quantize import Int8Weight

Pair = int | tuple[int, int]


def conv2d_frozen(x: Tensor, weight: Tensor | Int8Weight, bias: Tensor | None, stride: Pair = 1, padding: Pair = 0) -> Tensor:
    return _FrozenConv2d.apply(x, weight, bias, stride, padding)


class _FrozenConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding):
        ctx.weight, ctx.stride, ctx.padding, ctx.shape = weight, stride, padding, x.shape
        return F.conv2d(x, dense(weight, x), bias, stride, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        dx = None
        if ctx.needs_input_grad[0]:
            dx = conv2d_input(ctx.shape, dense(ctx.weight, dy), dy, ctx.stride, ctx.padding)
        return dx, None, None, None, None


def dense(weight: Tensor | Int8Weight, like: Tensor) -> Tensor:
    """The weight in like's dtype and memory format: backward shows cuDNN no x to take it from."""
    dense = weight if isinstance(weight, Tensor) else weight.dequantised(like.dtype)
    channels_last = like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous()
    return dense.contiguous(memory_format=torch.channels_last) if channels_last else dense
