"""A transformer block's feed-forward part with its residual, as one node.

    p = LoRA linear(LayerNorm(x))      x (..., d), p (..., 8 d): hidden and gate side by side
    y = x + LoRA linear(GEGLU(p))

Kept for backward: x, p in its own format or as int8, two numbers per row and the two n Aᵀ. LayerNorm and GEGLU are made
again: without that they would be the largest tensors of the whole U-Net.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from crumb.kernels import geglu, linear
from crumb.kernels.layer_norm import layer_norm_again, layer_norm_backward, layer_norm_forward
from crumb.kernels.linear import Layer, with_masks
from crumb.kernels.lora_linear import as_rows
from crumb.kernels.norm_linears import Norm


def feed_forward(x: Tensor, norm: Norm, layer_in: Layer, layer_out: Layer, keep_int8: bool = False) -> Tensor:
    """y as above. `keep_int8`: p is kept in half the bytes."""
    return _FeedForward.apply(x, norm, layer_in, layer_out, keep_int8, *linear.loras([layer_in, layer_out]))


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, norm, layer_in, layer_out, keep_int8, *loras):
        rows = as_rows(x)
        normed, mean, rstd = layer_norm_forward(rows, norm.weight, norm.bias, norm.eps)
        projected, down_in = linear.forward(normed, layer_in)
        del normed
        if keep_int8:
            hidden, packed = geglu.geglu_forward_int8(projected)
            kept = (packed.codes, packed.scales)
        else:
            hidden, kept = geglu.geglu_forward(projected), (projected,)
        del projected
        y, down_out = linear.forward(hidden, layer_out)
        ctx.save_for_backward(x, mean, rstd, down_in, down_out, layer_in.kept, layer_out.kept, *kept)
        ctx.norm, ctx.layers, ctx.keep_int8 = norm, with_masks([layer_in, layer_out], [None, None]), keep_int8
        return y.add_(rows).view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, mean, rstd, down_in, down_out, mask_in, mask_out, *kept = ctx.saved_tensors
        layer_in, layer_out = with_masks(ctx.layers, [mask_in, mask_out])
        rows, dy_rows = as_rows(x), as_rows(dy)
        # dA of the second linear needs the GEGLU's result, which its backward pass makes again beside the gradient.
        d_hidden, _, d_out_B = linear.backward(dy_rows, None, down_out, layer_out)
        if ctx.keep_int8:
            d_projected, hidden = geglu.geglu_backward_int8(d_hidden, geglu.Int8Projection(*kept))
        else:
            d_projected, hidden = geglu.geglu_backward(d_hidden, *kept)
        d_out_A = linear.lora_A_gradient(dy_rows, hidden, layer_out)
        del d_hidden, hidden
        normed = None
        if layer_in.lora_A is not None:  # only for its dA
            normed = layer_norm_again(rows, mean, rstd, ctx.norm.weight, ctx.norm.bias)
        d_normed, d_in_A, d_in_B = linear.backward(d_projected, normed, down_in, layer_in, ctx.needs_input_grad[0])
        dx = None
        if d_normed is not None:
            dx = layer_norm_backward(d_normed, rows, mean, rstd, ctx.norm.weight, add=dy_rows).view_as(x)
        return dx, None, None, None, None, d_in_A, d_in_B, d_out_A, d_out_B
