"""A frozen linear layer whose weight is int8, with a LoRA beside it, multiplied on int8 tensor cores (W8A8).

    x[m, k] ≈ t[m, g] · P[m, k]                       g = k // 128; P int8, t fp32 = largest |x| of row m in g, / 127
    y[m, n] = w[n] · Σg t[m, g] (P Qᵀ over group g) + b[n] + c · (s Bᵀ)[m, n]                  s = x Aᵀ

    dS = c · dy B
    dy[m, n] · w[n] ≈ u[m, h] · D[m, n]               h = n // 128; D int8
    dX[m, k] = Σh u[m, h] (D Q over group h) + (dS A)[m, k]
    dA = dSᵀ x,  dB = c · dyᵀ s                        from 16 bit, x as it came, summed in fp32

x (M, K); W ≈ w[n] · Q[n, k] (N, K), an Int8Weight; A (R, K), B (N, R). Products of int8 are summed in int32, exactly; s and
dS are kept in x's dtype; the rest is fp32, and y and dX are rounded once.

Two kernels each way. The first reads x (or dy) once: it quantises a row's group of 128 and, from the same registers,
multiplies by A (or B). The second multiplies int8 by int8 and adds the LoRA before the result is written for the first
time, in 16 bit: an int32 product in memory would cost more than the product.

Backward first writes Qᵀ into a buffer that all layers share. Int8 tensor cores take both operands with the summed index
innermost, and 8-bit values can't be turned on their way from shared memory: read in place, Q would come byte by byte,
eight loads for every instruction of the product.

A group of 128 rather than a whole row: where a few channels are 20 to 60 times the others, as behind a LayerNorm, a row's
scale leaves the others a handful of steps, and y is off by 4 to 10 % rather than 2.5 %; dX by 2 to 6 % rather than 2 %.
A group also needs no second look at the row. Its int32 sums are turned to fp32 once for 128 products.

Where Triton can't do this, a GPU multiplies by the weight dequantised to 16 bit, through one buffer, which is more
accurate and no faster than a 16-bit layer; the processor does the arithmetic above in plain torch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from crumb.kernels import lora_linear as linear16
from crumb.kernels.dispatch import uses_triton, way
from crumb.kernels.language import cdiv, jit, tl, triton
from crumb.kernels.launch import Launch, launch_on, num_processors
from crumb.kernels.lora_linear import LoRALinearFunction, Needs, Products, leave_out
from crumb.kernels.quantize import INT8_LARGEST, TINY, Int8Weight, weight_buffer

GROUP = 128
LARGEST_RANK = 128
"""Beyond it the LoRA's own products are large enough to be worth cuBLAS."""


def lora_linear_int8(x: Tensor, weight: Int8Weight, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor,
                     scaling: float) -> Tensor:
    """y as above, in x's dtype. x may have any number of leading dimensions; weight and bias are frozen."""
    return LoRALinearFunction.apply(x, weight, bias, lora_A, lora_B, scaling, PRODUCTS)


def forward(rows: Tensor, weight: Int8Weight, bias: Tensor | None, lora_A: Tensor | None, lora_B: Tensor | None,
            scaling: float, kept: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """y (M, N), and s = x Aᵀ (M, R) for backward; A and B are None for a layer without a LoRA."""
    if _needs_dequantised(rows):
        return linear16.forward(rows, _dequantised(weight, rows.dtype), bias, lora_A, lora_B, scaling, kept)
    fused = lora_A is not None and len(lora_A) <= LARGEST_RANK
    quantised, down = quantise(rows, factor=lora_A.T if fused else None)
    y = multiply(quantised, weight.values, weight.scales, bias, leave_out(down, kept), lora_B.T if fused else None, scaling)
    if lora_A is not None and not fused:
        down = leave_out(rows @ lora_A.to(rows.dtype).T, kept)
        y.addmm_(down, lora_B.to(rows.dtype).T, alpha=scaling)
    return y, down


def backward(dy: Tensor, rows: Tensor | None, down: Tensor | None, weight: Int8Weight, lora_A: Tensor | None,
             lora_B: Tensor | None, scaling: float, needs: Needs,
             kept: Tensor | None = None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dX, dA and dB, as far as they are needed; `rows` is only read for dA and `down` only for dB."""
    if _needs_dequantised(dy):
        dense = _dequantised(weight, dy.dtype) if needs[0] else None
        return linear16.backward(dy, rows, down, dense, lora_A, lora_B, scaling, needs, kept)
    fused = needs[0] and lora_A is not None and len(lora_A) <= LARGEST_RANK
    dx = d_down = None
    if lora_A is not None and not fused and (needs[0] or needs[1]):
        d_down = linear16.down_gradient(dy, lora_B, scaling, kept)
    if needs[0]:
        quantised, projected = quantise(dy, weight.scales, lora_B if fused else None, scaling)
        leave_out(projected, kept)
        dx = multiply(quantised, _transposed(weight.values), None, None, projected, lora_A if fused else None, 1.0)
        if fused:
            d_down = projected
        elif lora_A is not None:
            dx.addmm_(d_down, lora_A.to(dy.dtype))
    return dx, *linear16.factor_gradients(dy, rows, down, d_down, lora_A, lora_B, scaling, needs)


PRODUCTS = Products(forward, backward)


def _needs_dequantised(rows: Tensor) -> bool:
    return rows.is_cuda and not uses_triton("lora_linear_int8", rows)


def _dequantised(weight: Int8Weight, dtype: torch.dtype) -> Tensor:
    return weight.dequantised(dtype, weight_buffer(weight.shape, dtype, weight.values.device))


def _transposed(values: Tensor) -> Tensor:
    """In the shared buffer: gone at the next call."""
    num_rows, num_columns = values.shape
    out = weight_buffer(torch.Size((num_columns, num_rows)), torch.int8, values.device)
    if not uses_triton("int8_transpose", values):
        return out.copy_(values.T)
    launch = launch_on("int8_transpose", values.device)
    grid = cdiv(num_rows, launch.blocks["BLOCK"]), cdiv(num_columns, launch.blocks["BLOCK"])
    transpose_kernel[grid](values, out, num_rows, num_columns, **launch.options())
    return out


@dataclass(frozen=True, eq=False)
class Quantised:
    values: Tensor
    """(M, L) int8."""
    scales: Tensor
    """(groups of L, M) fp32."""
    dtype: torch.dtype
    """Of what was quantised, and so of products with it."""


def quantise(rows: Tensor, fold: Tensor | None = None, factor: Tensor | None = None,
             scaling: float = 1.0) -> tuple[Quantised, Tensor | None]:
    """Int8 of rows · fold by groups of 128, and scaling · (rows @ factor).

    rows (M, L) contiguous; fold (L,) fp32, one where not given; factor (L, R) of any strides and dtype, cast to rows'.
    """
    compute = _quantise_triton if uses_triton("lora_linear_int8", rows) else _quantise_plain
    values, scales, projected = compute(rows, fold, factor, scaling)
    return Quantised(values, scales, rows.dtype), projected


def multiply(left: Quantised, weight: Tensor, weight_scales: Tensor | None, bias: Tensor | None, down: Tensor | None,
             up: Tensor | None, scaling: float) -> Tensor:
    """left @ weightᵀ · weight_scales + bias + scaling · (down @ up), in left's dtype.

    weight (C, L) int8, weight_scales (C,), bias (C,), all contiguous; down (M, R), its rows contiguous each, at any distance;
    up (R, C) of any strides and dtype.
    """
    compute = _multiply_triton if way("lora_linear_int8", weight.device, left.dtype).triton else _multiply_plain
    return compute(left, weight, weight_scales, bias, down, up, scaling)


def _quantise_plain(rows, fold, factor, scaling):
    num_rows, length = rows.shape
    folded = rows.float() if fold is None else rows.float() * fold
    groups = F.pad(folded, (0, -length % GROUP)).view(num_rows, cdiv(length, GROUP), GROUP)
    largest = groups.abs().amax(2)
    values = (groups * (INT8_LARGEST / largest.clamp_min(TINY))[:, :, None] + 0.5).floor_()
    values = values.nan_to_num_().to(torch.int8).flatten(1)[:, :length].contiguous()
    scales = (largest / INT8_LARGEST + groups.sum(2) * 0).T.contiguous()  # what is not finite must show in the product
    if factor is None:
        return values, scales, None
    return values, scales, (rows.float() @ factor.to(rows.dtype).float() * scaling).to(rows.dtype)


def _multiply_plain(left, weight, weight_scales, bias, down, up, scaling):
    total = torch.zeros(len(left.values), len(weight), device=weight.device)
    for values, piece, scales in zip(left.values.split(GROUP, 1), weight.split(GROUP, 1), left.scales):
        total.addcmul_(values.float() @ piece.float().T, scales[:, None])  # exact: 128 · 127² < 2²⁴
    if weight_scales is not None:
        total *= weight_scales
    if bias is not None:
        total += bias
    if down is not None:
        total += scaling * (down.float() @ up.to(left.dtype).float())
    return total.to(left.dtype)


def _quantise_triton(rows, fold, factor, scaling):
    num_rows, length = rows.shape
    values = torch.empty_like(rows, dtype=torch.int8)
    scales = torch.empty(cdiv(length, GROUP), num_rows, dtype=torch.float32, device=rows.device)
    rank = 0 if factor is None else factor.shape[1]
    projected = rows.new_empty(num_rows, rank) if rank else None
    launch = launch_on("int8_quantise" if rank < 32 else "int8_quantise_high_rank", rows.device)
    if num_rows:
        quantise_kernel[(cdiv(num_rows, launch.blocks["BLOCK_M"]),)](
            rows, fold, factor, values, scales, projected, scaling, num_rows, length, rank,
            *(factor.stride() if rank else (0, 0)), GROUP=GROUP, RANK=_padded(rank), **launch.options())
    return values, scales, projected


def _multiply_triton(left, weight, weight_scales, bias, down, up, scaling):
    (num_rows, length), num_columns = left.values.shape, len(weight)
    out = torch.empty(num_rows, num_columns, dtype=left.dtype, device=weight.device)
    rank = 0 if down is None else down.shape[1]
    strides = (down.stride(0), *up.stride()) if rank else (0, 0, 0)
    launch = _product_launch(num_rows, num_columns, weight.device)
    num_tiles = cdiv(num_rows, launch.blocks["BLOCK_M"]) * cdiv(num_columns, launch.blocks["BLOCK_N"])
    if num_rows:
        multiply_kernel[(num_tiles,)](
            left.values, left.scales, weight, weight_scales, bias, down, up, out, scaling, num_rows, num_columns, length,
            rank, *strides, GROUP=GROUP, RANK=_padded(rank), EVEN=length % GROUP == 0, **launch.options())
    return out


def _product_launch(num_rows: int, num_columns: int, device: torch.device) -> Launch:
    """Large tiles, unless they would leave processors idle."""
    large = launch_on("int8_multiply", device)
    num_tiles = cdiv(num_rows, large.blocks["BLOCK_M"]) * cdiv(num_columns, large.blocks["BLOCK_N"])
    return large if num_tiles >= num_processors(device) else launch_on("int8_multiply_small", device)


def _padded(rank: int) -> int:
    """tl.dot takes powers of two from 16 on."""
    return max(16, triton.next_power_of_2(rank)) if rank else 0


@jit
def quantise_kernel(rows, fold, factor, values, scales, projected, scaling, num_rows, length, rank,
                    factor_stride_l, factor_stride_r,
                    BLOCK_M: tl.constexpr, GROUP: tl.constexpr, RANK: tl.constexpr):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_start = row.to(tl.int64)[:, None] * length
    r = tl.arange(0, RANK if RANK > 0 else 1)
    down = tl.zeros((BLOCK_M, RANK if RANK > 0 else 1), tl.float32)
    for start in range(0, length, GROUP):
        column = start + tl.arange(0, GROUP)
        inside = (row < num_rows)[:, None] & (column < length)[None, :]
        x = tl.load(rows + row_start + column[None, :], inside, 0.0)
        v = x.to(tl.float32)
        if fold is not None:
            v *= tl.load(fold + column, column < length, 0.0)[None, :]
        largest = tl.max(tl.abs(v), 1)
        q = tl.floor(v * (127.0 / tl.maximum(largest, 1e-30))[:, None] + 0.5)
        tl.store(values + row_start + column[None, :], q.to(tl.int8), inside)
        # Integers have no NaN: what is not finite must show in the product all the same.
        tl.store(scales + (start // GROUP) * num_rows + row, largest / 127.0 + tl.sum(v, 1) * 0.0, row < num_rows)
        if RANK > 0:
            a = tl.load(factor + column[:, None] * factor_stride_l + r[None, :] * factor_stride_r,
                        (column < length)[:, None] & (r < rank)[None, :], 0.0)
            down = tl.dot(x, a.to(x.dtype), down)
    if RANK > 0:
        tl.store(projected + row[:, None] * rank + r[None, :], down * scaling,
                 (row < num_rows)[:, None] & (r < rank)[None, :])


@jit
def multiply_kernel(left, left_scales, weight, weight_scales, bias, down, up, out, scaling, num_rows, num_columns, length,
                    rank, down_stride, up_stride_r, up_stride_c,
                    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BAND: tl.constexpr, GROUP: tl.constexpr,
                    RANK: tl.constexpr, EVEN: tl.constexpr):
    # Tiles are taken in bands of BAND tiles of rows, column by column, so that neighbours find the weight in the cache.
    tile = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(num_columns, BLOCK_N)
    first = tile // (BAND * tiles_n) * BAND
    height = tl.minimum(tiles_m - first, BAND)
    within = tile % (BAND * tiles_n)
    row = (first + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = within // height * BLOCK_N + tl.arange(0, BLOCK_N)
    row_in, column_in = row < num_rows, column < num_columns
    row_or_last, column_or_last = tl.minimum(row, num_rows - 1), tl.minimum(column, num_columns - 1)

    # A group is two products: before sm_90 Triton carries the operands of a loop's only product from one round to the next
    # byte by byte, which takes more instructions than the product.
    HALF: tl.constexpr = GROUP // 2
    inner = tl.arange(0, HALF)
    left_at = left + row_or_last.to(tl.int64)[:, None] * length + inner[None, :]
    weight_at = weight + inner[:, None] + column_or_last[None, :] * length
    scales_at = left_scales + row_or_last
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, length, GROUP):
        t = tl.load(scales_at)
        if EVEN:
            acc = tl.dot(tl.load(left_at), tl.load(weight_at), out_dtype=tl.int32)
            acc = tl.dot(tl.load(left_at + HALF), tl.load(weight_at + HALF), acc, out_dtype=tl.int32)
        else:
            in_1, in_2 = inner < length - start, inner < length - start - HALF
            acc = tl.dot(tl.load(left_at, in_1[None, :], 0), tl.load(weight_at, in_1[:, None], 0), out_dtype=tl.int32)
            acc = tl.dot(tl.load(left_at + HALF, in_2[None, :], 0), tl.load(weight_at + HALF, in_2[:, None], 0), acc,
                         out_dtype=tl.int32)
        total += acc.to(tl.float32) * t[:, None]
        left_at += GROUP
        weight_at += GROUP
        scales_at += num_rows

    if weight_scales is not None:
        total *= tl.load(weight_scales + column, column_in, 0.0)[None, :]
    if bias is not None:
        total += tl.load(bias + column, column_in, 0.0).to(tl.float32)[None, :]
    if RANK > 0:
        r = tl.arange(0, RANK)
        s = tl.load(down + row[:, None] * down_stride + r[None, :], row_in[:, None] & (r < rank)[None, :], 0.0)
        b = tl.load(up + r[:, None] * up_stride_r + column[None, :] * up_stride_c,
                    (r < rank)[:, None] & column_in[None, :], 0.0)
        total += scaling * tl.dot(s, b.to(s.dtype))
    tl.store(out + row.to(tl.int64)[:, None] * num_columns + column[None, :], total,
             row_in[:, None] & column_in[None, :])


@jit
def transpose_kernel(matrix, out, num_rows, num_columns, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tile = tl.load(matrix + row[:, None] * num_columns + column[None, :],
                   (row < num_rows)[:, None] & (column < num_columns)[None, :], 0)
    tl.store(out + column[:, None] * num_rows + row[None, :], tl.trans(tile),
             (column < num_columns)[:, None] & (row < num_rows)[None, :])
