"""GroupNorm with a frozen affine part, followed by SiLU or not, on images in either memory format.

    x̂ = (x - μ) / σ               x (B, C, H, W); mean μ and rstd 1/σ of the C/G channels of a group, (B, G)
    z = x̂ w + b                   weight w, bias b (C,), σ² = variance + eps
    y = z sigmoid(z)              or y = z without activation

Gradient, over the mean of one group ⟨ ⟩:

    g = dy sigmoid(z) (1 + z (1 - sigmoid(z))) w
    dx = (g - ⟨g⟩ - x̂ ⟨g x̂⟩) / σ

Only x and two fp32 numbers a group are kept for backward; y can be had again from them. There are no gradients of w and
b. Results have the dtype and memory format of x (contiguous or channels_last); arithmetic is fp32 inside (float64 for
float64).
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from crumb.kernels.dispatch import uses_triton
from crumb.kernels.language import cdiv, jit, tl
from crumb.kernels.launch import Launch, launch_on


def group_norm_silu(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, activation: bool = True) -> Tensor:
    """y as above, differentiable in x; keeps x, and mean and rstd of its groups."""
    return _GroupNormSiLU.apply(x, num_groups, weight, bias, eps, activation)


class _GroupNormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, num_groups, weight, bias, eps, activation):
        y, mean, rstd = group_norm_silu_forward(x, num_groups, weight, bias, eps, activation)
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        ctx.activation = activation
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        dx = group_norm_silu_backward(dy, *ctx.saved_tensors, ctx.activation)
        return dx, None, None, None, None, None


# Without autograd, for functions with a backward of their own.

def group_norm_silu_forward(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float,
                            activation: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """y, and the mean and rstd of x's groups."""
    if x.shape[1] % num_groups:
        raise ValueError(f"{x.shape[1]} channels don't divide into {num_groups} groups")
    forward = _forward_triton if uses_triton("group_norm_silu", x) else _forward_plain
    return forward(_dense(x), num_groups, weight, bias, eps, activation)


def group_norm_silu_again(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor,
                          activation: bool = True) -> Tensor:
    """y once more, from what forward found."""
    again = _again_triton if uses_triton("group_norm_silu", x) else _again_plain
    return again(_dense(x), mean, rstd, weight, bias, activation)


def group_norm_silu_backward(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor,
                             activation: bool = True) -> Tensor:
    """dx."""
    x = _dense(x)
    backward = _backward_triton if uses_triton("group_norm_silu", x) else _backward_plain
    return backward(dy.contiguous(memory_format=_format_of(x)), x, mean, rstd, weight, bias, activation)


def _format_of(x: Tensor) -> torch.memory_format:
    """Of a tensor that _dense gave."""
    return torch.contiguous_format if x.is_contiguous() else torch.channels_last


def _dense(x: Tensor) -> Tensor:
    """x itself in either memory format, otherwise a contiguous copy."""
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


# Triton. A program computes a tile of BLOCK_C channels by BLOCK_P positions (pixels) of one image. The stride that is 1
# tells the two memory formats apart. Sums of a group need three launches: of every channel of every tile, of a group's
# tiles, and the result that uses them; so that one image fills a GPU, and with the same result at every run.

@jit
def _tile(num_channels, num_positions, stride_channel, stride_position, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """Where this program's tile begins, the offsets of its elements from there, its channels, and what lies inside."""
    image = tl.program_id(2).to(tl.int64)
    channel, position = tl.program_id(1).to(tl.int64) * BLOCK_C, tl.program_id(0).to(tl.int64) * BLOCK_P
    start = image * num_channels * num_positions + channel * stride_channel + position * stride_position
    local_channels, local_positions = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_P)
    offsets = local_channels[:, None] * stride_channel + local_positions[None, :] * stride_position
    channels = tl.program_id(1) * BLOCK_C + local_channels
    positions = tl.program_id(0) * BLOCK_P + local_positions
    inside = (channels < num_channels)[:, None] & (positions < num_positions)[None, :]
    return start, offsets, channels, inside


@jit
def _group_of(channels, num_channels, num_groups):
    """The places of the channels' groups in (B, G)."""
    return tl.program_id(2) * num_groups + channels // (num_channels // num_groups)


@jit
def _store_partial(partial, values, channels, num_channels):
    """partial (B, tiles, C): one number of each channel of a tile."""
    place = (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)) * num_channels + channels
    tl.store(partial + place, values, channels < num_channels)


@jit
def statistics_kernel(x, means, squares, num_channels, num_positions, stride_channel, stride_position,
                      BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """Of every channel of a tile: the mean, and the sum of squared distances from this mean."""
    start, offsets, channels, inside = _tile(
        num_channels, num_positions, stride_channel, stride_position, BLOCK_C, BLOCK_P)
    values = tl.load(x + start + offsets, inside, 0.0).to(tl.float32)
    count = tl.minimum(num_positions - tl.program_id(0) * BLOCK_P, BLOCK_P)
    mean = tl.sum(values, axis=1) / count
    centred = tl.where(inside, values - mean[:, None], 0.0)
    _store_partial(means, mean, channels, num_channels)
    _store_partial(squares, tl.sum(centred * centred, axis=1), channels, num_channels)


@jit
def _partials_of_group(start, num_tiles, num_channels, num_groups, BLOCK: tl.constexpr):
    """Places in (B, tiles, C) of BLOCK of this group's numbers, and their tiles."""
    group_width = num_channels // num_groups
    index = start + tl.arange(0, BLOCK)
    tile = index // group_width
    image, group = tl.program_id(0) // num_groups, tl.program_id(0) % num_groups
    place = (image * num_tiles + tile) * num_channels + group * group_width + index % group_width
    return place, tile, tile < num_tiles


@jit
def merge_statistics_kernel(means, squares, mean, rstd, num_tiles, num_channels, num_groups, num_positions, tile_size, eps,
                            BLOCK: tl.constexpr):
    """Of one group: the squares about its mean are those about the tiles' means plus these means' own about it."""
    num_partials = num_tiles * (num_channels // num_groups)
    size = num_positions * (num_channels // num_groups)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_partials, BLOCK):
        place, tile, inside = _partials_of_group(start, num_tiles, num_channels, num_groups, BLOCK)
        count = tl.minimum(num_positions - tile * tile_size, tile_size)
        total += tl.load(means + place, inside, 0.0) * count
    group_mean = tl.sum(total, axis=0) / size
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_partials, BLOCK):
        place, tile, inside = _partials_of_group(start, num_tiles, num_channels, num_groups, BLOCK)
        count = tl.minimum(num_positions - tile * tile_size, tile_size)
        distance = tl.load(means + place, inside, 0.0) - group_mean
        total += tl.where(inside, tl.load(squares + place, inside, 0.0) + distance * distance * count, 0.0)
    tl.store(mean + tl.program_id(0), group_mean)
    tl.store(rstd + tl.program_id(0), 1.0 / tl.sqrt(tl.sum(total, axis=0) / size + eps))


@jit
def forward_kernel(x, y, mean, rstd, weight, bias, num_channels, num_groups, num_positions, stride_channel, stride_position,
                   ACTIVATION: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    start, offsets, channels, inside = _tile(
        num_channels, num_positions, stride_channel, stride_position, BLOCK_C, BLOCK_P)
    there, group = channels < num_channels, _group_of(channels, num_channels, num_groups)
    scale = tl.load(rstd + group, there, 0.0) * tl.load(weight + channels, there, 0.0).to(tl.float32)
    offset = tl.load(bias + channels, there, 0.0).to(tl.float32)
    values = tl.load(x + start + offsets, inside, 0.0).to(tl.float32)
    z = (values - tl.load(mean + group, there, 0.0)[:, None]) * scale[:, None] + offset[:, None]
    if ACTIVATION:
        z = z * tl.sigmoid(z)
    tl.store(y + start + offsets, z.to(y.dtype.element_ty), inside)


@jit
def _gradient(dy, x, mean, rstd, weight, bias, start, offsets, channels, inside, num_channels, num_groups,
              ACTIVATION: tl.constexpr):
    """g and x̂ of a tile, and 1/σ of its channels."""
    there, group = channels < num_channels, _group_of(channels, num_channels, num_groups)
    channel_rstd = tl.load(rstd + group, there, 0.0)[:, None]
    channel_weight = tl.load(weight + channels, there, 0.0).to(tl.float32)[:, None]
    values = tl.load(x + start + offsets, inside, 0.0).to(tl.float32)
    normalised = (values - tl.load(mean + group, there, 0.0)[:, None]) * channel_rstd
    gradient = tl.load(dy + start + offsets, inside, 0.0).to(tl.float32) * channel_weight
    if ACTIVATION:
        z = normalised * channel_weight + tl.load(bias + channels, there, 0.0).to(tl.float32)[:, None]
        sigmoid = tl.sigmoid(z)
        gradient *= sigmoid * (1.0 + z * (1.0 - sigmoid))
    return gradient, normalised, channel_rstd


@jit
def gradient_sums_kernel(dy, x, mean, rstd, weight, bias, sums, product_sums, num_channels, num_groups, num_positions,
                         stride_channel, stride_position,
                         ACTIVATION: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """Of every channel of a tile: the sums of g and g x̂."""
    start, offsets, channels, inside = _tile(
        num_channels, num_positions, stride_channel, stride_position, BLOCK_C, BLOCK_P)
    gradient, normalised, _ = _gradient(
        dy, x, mean, rstd, weight, bias, start, offsets, channels, inside, num_channels, num_groups, ACTIVATION)
    _store_partial(sums, tl.sum(gradient, axis=1), channels, num_channels)
    _store_partial(product_sums, tl.sum(gradient * normalised, axis=1), channels, num_channels)


@jit
def merge_sums_kernel(sums, product_sums, mean_gradient, mean_product, num_tiles, num_channels, num_groups, num_positions,
                      BLOCK: tl.constexpr):
    """Of one group: the means of g and g x̂."""
    num_partials = num_tiles * (num_channels // num_groups)
    size = num_positions * (num_channels // num_groups)
    total, product_total = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_partials, BLOCK):
        place, _, inside = _partials_of_group(start, num_tiles, num_channels, num_groups, BLOCK)
        total += tl.load(sums + place, inside, 0.0)
        product_total += tl.load(product_sums + place, inside, 0.0)
    tl.store(mean_gradient + tl.program_id(0), tl.sum(total, axis=0) / size)
    tl.store(mean_product + tl.program_id(0), tl.sum(product_total, axis=0) / size)


@jit
def backward_kernel(dy, x, dx, mean, rstd, weight, bias, mean_gradient, mean_product, num_channels, num_groups, num_positions,
                    stride_channel, stride_position,
                    ACTIVATION: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    start, offsets, channels, inside = _tile(
        num_channels, num_positions, stride_channel, stride_position, BLOCK_C, BLOCK_P)
    gradient, normalised, channel_rstd = _gradient(
        dy, x, mean, rstd, weight, bias, start, offsets, channels, inside, num_channels, num_groups, ACTIVATION)
    there, group = channels < num_channels, _group_of(channels, num_channels, num_groups)
    result = gradient - tl.load(mean_gradient + group, there, 0.0)[:, None]
    result = (result - normalised * tl.load(mean_product + group, there, 0.0)[:, None]) * channel_rstd
    tl.store(dx + start + offsets, result.to(dx.dtype.element_ty), inside)


def _forward_triton(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float,
                    activation: bool) -> tuple[Tensor, Tensor, Tensor]:
    num_images, num_channels, num_positions = _sizes(x)
    grid, launch = _grid_and_launch(x, "sums")
    means, squares = x.new_empty(2, num_images, grid[0], num_channels, dtype=torch.float32)
    statistics_kernel[grid](x, means, squares, num_channels, num_positions, *_strides(x), **launch.options())
    mean, rstd = (x.new_empty(num_images, num_groups, dtype=torch.float32) for _ in range(2))
    merge_statistics_kernel[(mean.numel(),)](
        means, squares, mean, rstd, grid[0], num_channels, num_groups, num_positions, launch.blocks["BLOCK_P"], eps,
        **launch_on("group_norm_silu merge", x.device).options())
    return _again_triton(x, mean, rstd, weight, bias, activation), mean, rstd


def _again_triton(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, activation: bool) -> Tensor:
    _, num_channels, num_positions = _sizes(x)
    y = torch.empty_like(x)
    grid, launch = _grid_and_launch(x, "apply")
    forward_kernel[grid](x, y, mean, rstd, weight, bias, num_channels, mean.shape[1], num_positions, *_strides(x),
                         ACTIVATION=activation, **launch.options())
    return y


def _backward_triton(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor,
                     activation: bool) -> Tensor:
    num_images, num_channels, num_positions = _sizes(x)
    num_groups, strides = mean.shape[1], _strides(x)
    grid, launch = _grid_and_launch(x, "sums")
    sums, product_sums = x.new_empty(2, num_images, grid[0], num_channels, dtype=torch.float32)
    gradient_sums_kernel[grid](dy, x, mean, rstd, weight, bias, sums, product_sums, num_channels, num_groups, num_positions,
                               *strides, ACTIVATION=activation, **launch.options())
    mean_gradient, mean_product = torch.empty_like(mean), torch.empty_like(mean)
    merge_sums_kernel[(mean.numel(),)](
        sums, product_sums, mean_gradient, mean_product, grid[0], num_channels, num_groups, num_positions,
        **launch_on("group_norm_silu merge", x.device).options())
    dx = torch.empty_like(x)
    grid, launch = _grid_and_launch(x, "apply")
    backward_kernel[grid](dy, x, dx, mean, rstd, weight, bias, mean_gradient, mean_product, num_channels, num_groups,
                          num_positions, *strides, ACTIVATION=activation, **launch.options())
    return dx


def _sizes(x: Tensor) -> tuple[int, int, int]:
    """Images, channels, positions."""
    return x.shape[0], x.shape[1], x.shape[2:].numel()


def _strides(x: Tensor) -> tuple[int, int]:
    """From a channel to the next, from a position to the next."""
    return (_sizes(x)[2], 1) if x.is_contiguous() else (1, x.shape[1])


def _grid_and_launch(x: Tensor, step: str) -> tuple[tuple[int, int, int], Launch]:
    launch = launch_on(f"group_norm_silu {step} {'contiguous' if x.is_contiguous() else 'channels_last'}", x.device)
    num_images, num_channels, num_positions = _sizes(x)
    num_tiles = cdiv(num_positions, launch.blocks["BLOCK_P"])
    return (num_tiles, cdiv(num_channels, launch.blocks["BLOCK_C"]), num_images), launch


# Plain torch.

@torch.no_grad()
def _forward_plain(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float,
                   activation: bool) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, rstd = torch.native_group_norm(
        _for_torchs_forward(x), _affine(x, weight), _affine(x, bias), *_sizes(x), num_groups, eps)
    if activation:
        F.silu(y, inplace=True)
    return y.contiguous(memory_format=_format_of(x)), mean, rstd


def _for_torchs_forward(x: Tensor) -> Tensor:
    """On a processor torch takes the variance of channels_last as the mean square less the squared mean, in fp32 also for
    fp32: enough for 16-bit x, wrong by a factor for an fp32 mean 1000 times the deviation. Contiguous x has no such flaw."""
    return x.contiguous() if x.is_cuda or x.dtype.itemsize > 2 else x


def _for_torchs_backward(x: Tensor) -> Tensor:
    """On a GPU torch's own functions know contiguous memory only: forward refuses any other, backward reads it wrongly."""
    return x.contiguous() if x.is_cuda else x


@torch.no_grad()
def _again_plain(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, activation: bool) -> Tensor:
    y = _normalised_plain(x, mean, rstd, weight, bias)
    return F.silu(y, inplace=True) if activation else y


@torch.no_grad()
def _backward_plain(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor,
                    activation: bool) -> Tensor:
    if activation:
        z = _normalised_plain(x, mean, rstd, weight, bias)
        dy = torch.ops.aten.silu_backward.grad_input(dy, z, grad_input=z)
    dx, _, _ = torch.ops.aten.native_group_norm_backward(
        _for_torchs_backward(dy), _for_torchs_backward(x), mean, rstd, _affine(x, weight), *_sizes(x), mean.shape[1],
        [True, False, False])
    return dx.contiguous(memory_format=_format_of(x))


def _normalised_plain(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """z, by one multiply-add with a scale and an offset of each image's channels."""
    group_width, shape = x.shape[1] // mean.shape[1], (*x.shape[:2], *[1] * (x.dim() - 2))
    scale = rstd.repeat_interleave(group_width, dim=1) * weight
    offset = bias - mean.repeat_interleave(group_width, dim=1) * scale
    return torch.addcmul(offset.view(shape), x, scale.view(shape), out=torch.empty_like(x))


def _affine(x: Tensor, parameter: Tensor) -> Tensor:
    """On a processor torch gives mean and rstd in the dtype of weight and bias; on a GPU all of these must have x's own."""
    return parameter.float() if x.device.type == "cpu" and x.dtype.itemsize == 2 else parameter.to(x.dtype)
