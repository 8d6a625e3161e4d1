"""A frozen linear layer with a LoRA beside it, as one autograd node.

    s = x Aᵀ                      x (..., K), A (R, K)
    y = x Wᵀ + b + c · s Bᵀ       W (N, K), b (N,), B (N, R), c = alpha / rank

Gradients, cheap products first (rank R is small):

    dS = c · dy B                 (M, R)
    dX = dy W + dS A
    dA = dSᵀ x
    dB = c · dyᵀ s

Only x and s are kept for backward, once, in x's dtype; W needs no gradient. A and B may be fp32
masters while x is 16-bit: they are cast on use, and their gradients come back in their own dtype.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """y as above, in x's dtype. x may have any number of leading dimensions; weight and bias are frozen."""
    return _LoRALinear.apply(x, weight, bias, lora_A, lora_B, scaling)


def lora_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor,
                          scaling: float) -> Tensor:
    """The same by plain differentiable operations: the definition of correct."""
    base = torch.nn.functional.linear(x, weight, bias)
    return base + scaling * (x @ lora_A.to(x.dtype).T @ lora_B.to(x.dtype).T)


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_B, scaling):
        rows = x.reshape(-1, x.shape[-1])
        down = rows @ lora_A.to(x.dtype).T
        y = rows @ weight.T if bias is None else torch.addmm(bias, rows, weight.T)
        y.addmm_(down, lora_B.to(x.dtype).T, alpha=scaling)
        ctx.save_for_backward(x, weight, lora_A, lora_B, down)
        ctx.scaling = scaling
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, lora_A, lora_B, down = ctx.saved_tensors
        needs_x, _, _, needs_A, needs_B, _ = ctx.needs_input_grad
        rows, dy_rows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        d_down = (dy_rows @ lora_B.to(dy.dtype)).mul_(ctx.scaling)
        dx = d_lora_A = d_lora_B = None
        if needs_x:
            dx = (dy_rows @ weight).addmm_(d_down, lora_A.to(dy.dtype)).view_as(x)
        if needs_A:
            d_lora_A = (d_down.T @ rows).to(lora_A.dtype)
        if needs_B:
            d_lora_B = (dy_rows.T @ down).mul_(ctx.scaling).to(lora_B.dtype)
        return dx, None, None, d_lora_A, d_lora_B, None
