"""A frozen linear layer with a LoRA beside it, as one autograd node.

    s = x Aᵀ                      x (M, K), A (R, K)
    y = x Wᵀ + b + c · s Bᵀ       W (N, K), b (N,), B (N, R), c = alpha / rank

Gradients, cheap products first (rank R is small):

    dS = c · dy B                 (M, R)
    dX = dy W + dS A
    dA = dSᵀ x
    dB = c · dyᵀ s

Where dropout acts, s and dS are multiplied by `kept`, a bool mask (B, tokens or 1, R) over rows (B · tokens); c then makes
up for what is left out.

Only x and s are kept for backward, once, in x's dtype; W needs no gradient. A and B may be fp32
masters while x is 16-bit: they are cast on use, and their gradients come back in their own dtype, summed in fp32.

`forward` and `backward` work on rows, a contiguous (M, K) matrix, outside autograd. lora_linear_int8.py and
lora_linear_nf4.py have the same two for their own kind of weight, so that whatever is built of linear layers can be
built of any of the three. A layer without a LoRA has None for A and B, and keeps nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Needs = tuple[bool, bool, bool]
"""Whose gradients are wanted: those of x, A and B."""


def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """y as above, in x's dtype. x may have any number of leading dimensions; weight and bias are frozen."""
    return LoRALinearFunction.apply(x, weight, bias, lora_A, lora_B, scaling, PRODUCTS)


def lora_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor,
                          scaling: float) -> Tensor:
    """The same by plain differentiable operations: the definition of correct."""
    base = torch.nn.functional.linear(x, weight, bias)
    return base + scaling * (x @ lora_A.to(x.dtype).T @ lora_B.to(x.dtype).T)


def forward(rows: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor | None, lora_B: Tensor | None,
            scaling: float, kept: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """y (M, N), and s = x Aᵀ (M, R) for backward."""
    y = rows @ weight.T if bias is None else torch.addmm(bias, rows, weight.T)
    if lora_A is None:
        return y, None
    down = leave_out(rows @ lora_A.to(rows.dtype).T, kept)
    return y.addmm_(down, lora_B.to(rows.dtype).T, alpha=scaling), down


def backward(dy: Tensor, rows: Tensor | None, down: Tensor | None, weight: Tensor, lora_A: Tensor | None,
             lora_B: Tensor | None, scaling: float, needs: Needs,
             kept: Tensor | None = None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dX, dA and dB, as far as they are needed; `rows` is only read for dA and `down` only for dB."""
    d_down = down_gradient(dy, lora_B, scaling, kept) if lora_A is not None and (needs[0] or needs[1]) else None
    dx = None
    if needs[0]:
        dx = dy @ weight
        if d_down is not None:
            dx.addmm_(d_down, lora_A.to(dy.dtype))
    return dx, *factor_gradients(dy, rows, down, d_down, lora_A, lora_B, scaling, needs)


def down_gradient(dy: Tensor, lora_B: Tensor, scaling: float, kept: Tensor | None = None) -> Tensor:
    """dS."""
    return leave_out((dy @ lora_B.to(dy.dtype)).mul_(scaling), kept)


def leave_out(down: Tensor | None, kept: Tensor | None) -> Tensor | None:
    """s or dS (M, R) without what dropout leaves out, in place."""
    if down is not None and kept is not None:
        down.view(len(kept), -1, down.shape[1]).mul_(kept)
    return down


def factor_gradients(dy: Tensor, rows: Tensor | None, down: Tensor | None, d_down: Tensor | None, lora_A: Tensor | None,
                     lora_B: Tensor | None, scaling: float, needs: Needs) -> tuple[Tensor | None, Tensor | None]:
    """dA and dB in the factors' own dtypes."""
    d_lora_A = sum_over_rows(d_down, rows).to(lora_A.dtype) if needs[1] else None
    d_lora_B = sum_over_rows(dy, down).mul_(scaling).to(lora_B.dtype) if needs[2] else None
    return d_lora_A, d_lora_B


def sum_over_rows(left: Tensor, right: Tensor) -> Tensor:
    """leftᵀ right, in fp32 where they have 16 bits: thousands of rows may sum to more than fp16 holds, and masters are fp32."""
    if left.dtype not in (torch.float16, torch.bfloat16):
        return left.T @ right
    if left.is_cuda:
        return torch.mm(left.T, right, out_dtype=torch.float32)
    return left.T.float() @ right.float()


@dataclass(frozen=True)
class Products:
    """What one kind of weight brings to the autograd nodes below."""

    forward: Callable
    backward: Callable


PRODUCTS = Products(forward, backward)


class LoRALinearFunction(torch.autograd.Function):
    """The node of all three kinds of weight. The weight is kept by reference: it is frozen, and may be moved meanwhile."""

    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_B, scaling, products, kept=None):
        rows = as_rows(x)
        y, down = products.forward(rows, weight, bias, lora_A, lora_B, scaling, kept)
        _, _, _, needs_A, needs_B, *_ = ctx.needs_input_grad
        ctx.save_for_backward(rows if needs_A else None, down if needs_B else None, lora_A, lora_B, kept)
        ctx.weight, ctx.scaling, ctx.products, ctx.shape = weight, scaling, products, x.shape
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        needs_x, _, _, needs_A, needs_B, *_ = ctx.needs_input_grad
        rows, down, lora_A, lora_B, kept = ctx.saved_tensors
        dx, d_lora_A, d_lora_B = ctx.products.backward(as_rows(dy), rows, down, ctx.weight, lora_A, lora_B, ctx.scaling,
                                                       (needs_x, needs_A, needs_B), kept)
        return dx if dx is None else dx.view(ctx.shape), None, None, d_lora_A, d_lora_B, None, None, None


class FrozenLinearFunction(torch.autograd.Function):
    """A layer without a LoRA: dX needs the weight alone, so nothing is saved."""

    @staticmethod
    def forward(ctx, x, weight, bias, products):
        ctx.weight, ctx.products, ctx.shape = weight, products, x.shape
        y, _ = products.forward(as_rows(x), weight, bias, None, None, 0.0)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        dx, _, _ = ctx.products.backward(as_rows(dy), None, None, ctx.weight, None, None, 0.0, (True, False, False))
        return dx.view(ctx.shape), None, None, None


def as_rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()
