"""LayerNorm over the last dimension with a frozen affine part.

    x̂ = (x - μ) / σ               x (..., N); mean μ and rstd 1/σ (..., 1), σ² = variance + eps
    y = x̂ w + b                   weight w, bias b (N,)

Gradient, over the mean of one row ⟨ ⟩:

    g = dy w
    dx = (g - ⟨g⟩ - x̂ ⟨g x̂⟩) / σ

Only x and two fp32 numbers a row are kept for backward; y can be had again from them. A gradient that reaches x by
another way, as round a residual block, is added in the same store. There are no gradients of w and b. Arithmetic is
fp32 inside (float64 for float64), y and dx have x's dtype.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from crumb.kernels.dispatch import uses_triton
from crumb.kernels.language import cdiv, jit, tl
from crumb.kernels.launch import Launch, launch_on

MAX_WIDTH = 4096
"""Wider rows don't fit the registers of a program; plain torch takes them."""


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """y as above, differentiable in x; keeps x, and mean and rstd of its rows."""
    return _LayerNorm.apply(x, weight, bias, eps)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        y, mean, rstd = layer_norm_forward(x, weight, bias, eps)
        ctx.save_for_backward(x, mean, rstd, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return layer_norm_backward(dy, *ctx.saved_tensors), None, None, None


# Without autograd, for functions with a backward of their own.

def layer_norm_forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y, and the mean and rstd of x's rows."""
    forward = _forward_triton if _takes_triton(x) else _forward_plain
    return forward(x, weight, bias, eps)


def layer_norm_again(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """y once more, from what forward found."""
    again = _again_triton if _takes_triton(x) else _again_plain
    return again(x, mean, rstd, weight, bias)


def layer_norm_backward(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor,
                        add: Tensor | None = None) -> Tensor:
    """dx, plus `add`."""
    backward = _backward_triton if _takes_triton(x) else _backward_plain
    return backward(dy, x, mean, rstd, weight, add)


def _takes_triton(x: Tensor) -> bool:
    return x.shape[-1] <= MAX_WIDTH and uses_triton("layer_norm", x)


# Triton. One program computes TILE / BLOCK whole rows at once; one a program would leave most of a GPU idle at SDXL's
# widths. BLOCK is the width's next power of two, at least one row is taken.

@jit
def _rows(num_rows, width, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Where this program's rows begin, and the offsets of its elements from there."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    rows = tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    inside_rows = rows < num_rows - first
    return first, rows, columns, inside_rows, inside_rows & (columns < width), rows * width + columns


@jit
def forward_kernel(x, y, mean, rstd, weight, bias, num_rows, width, eps,
                   KNOWN: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    first, rows, columns, inside_rows, inside, offsets = _rows(num_rows, width, BLOCK, ROWS)
    values = tl.load(x + first * width + offsets, inside, 0.0).to(tl.float32)
    if KNOWN:
        row_mean = tl.load(mean + first + rows, inside_rows, 0.0)
        row_rstd = tl.load(rstd + first + rows, inside_rows, 0.0)
        centred = values - row_mean
    else:
        row_mean = tl.sum(values, axis=1, keep_dims=True) / width
        centred = tl.where(inside, values - row_mean, 0.0)
        row_rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1, keep_dims=True) / width + eps)
        tl.store(mean + first + rows, row_mean, inside_rows)
        tl.store(rstd + first + rows, row_rstd, inside_rows)
    w = tl.load(weight + columns, columns < width, 0.0).to(tl.float32)
    b = tl.load(bias + columns, columns < width, 0.0).to(tl.float32)
    result = centred * row_rstd * w + b
    tl.store(y + first * width + offsets, result.to(y.dtype.element_ty), inside)


@jit
def backward_kernel(dy, x, add, dx, mean, rstd, weight, num_rows, width, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    first, rows, columns, inside_rows, inside, offsets = _rows(num_rows, width, BLOCK, ROWS)
    row_mean = tl.load(mean + first + rows, inside_rows, 0.0)
    row_rstd = tl.load(rstd + first + rows, inside_rows, 0.0)
    values = tl.load(x + first * width + offsets, inside, 0.0).to(tl.float32)
    gradient = tl.load(dy + first * width + offsets, inside, 0.0).to(tl.float32)
    gradient *= tl.load(weight + columns, columns < width, 0.0).to(tl.float32)
    normalised = (values - row_mean) * row_rstd
    mean_gradient = tl.sum(gradient, axis=1, keep_dims=True) / width
    mean_product = tl.sum(gradient * normalised, axis=1, keep_dims=True) / width
    result = (gradient - mean_gradient - normalised * mean_product) * row_rstd
    if add is not None:
        result += tl.load(add + first * width + offsets, inside, 0.0).to(tl.float32)
    tl.store(dx + first * width + offsets, result.to(dx.dtype.element_ty), inside)


def _forward_triton(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    x = x.contiguous()
    mean, rstd = (x.new_empty(*x.shape[:-1], 1, dtype=torch.float32) for _ in range(2))
    return _launch_forward(x, mean, rstd, weight, bias, eps, known=False), mean, rstd


def _again_triton(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _launch_forward(x.contiguous(), mean, rstd, weight, bias, 0.0, known=True)


def _launch_forward(x, mean, rstd, weight, bias, eps, known: bool) -> Tensor:
    y = torch.empty_like(x)
    grid, options = _grid_and_options(x)
    forward_kernel[grid](x, y, mean, rstd, weight, bias, mean.numel(), x.shape[-1], eps, KNOWN=known, **options)
    return y


def _backward_triton(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, add: Tensor | None) -> Tensor:
    dy, x = dy.contiguous(), x.contiguous()
    add = None if add is None else add.contiguous()
    dx = torch.empty_like(x)
    grid, options = _grid_and_options(x)
    backward_kernel[grid](dy, x, add, dx, mean, rstd, weight, mean.numel(), x.shape[-1], **options)
    return dx


def tile_of(width: int, launch: Launch) -> dict[str, int]:
    """The kernels' BLOCK and ROWS for a width."""
    block = max(1 << (width - 1).bit_length(), 32)
    return {"BLOCK": block, "ROWS": max(launch.blocks["TILE"] // block, 1)}


def _grid_and_options(x: Tensor) -> tuple[tuple[int], dict[str, int]]:
    launch, width = launch_on("layer_norm", x.device), x.shape[-1]
    tile = tile_of(width, launch)
    options = {**tile, "num_warps": launch.num_warps, "num_stages": launch.num_stages}
    return (cdiv(x.numel() // width, tile["ROWS"]),), options


# Plain torch.

@torch.no_grad()
def _forward_plain(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    weight, bias = _affine(x, weight), _affine(x, bias)
    return torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)


@torch.no_grad()
def _again_plain(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    normalised = torch.addcmul(-mean * rstd, x, rstd)
    return torch.addcmul(bias, normalised, weight, out=torch.empty_like(x))


@torch.no_grad()
def _backward_plain(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, add: Tensor | None) -> Tensor:
    weight = _affine(x, weight)
    dx, _, _ = torch.ops.aten.native_layer_norm_backward(
        dy, x, x.shape[-1:], mean, rstd, weight, None, [True, False, False])
    return dx if add is None else dx.add_(add)


def _affine(x: Tensor, parameter: Tensor) -> Tensor:
    """On a processor torch gives mean and rstd in the dtype of weight and bias, on a GPU these must have x's own."""
    return parameter.float() if x.device.type == "cpu" and x.dtype.itemsize == 2 else parameter.to(x.dtype)
