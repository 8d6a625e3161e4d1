"""LayerNorm, GroupNorm with SiLU and GEGLU on SDXL's sizes: crumb's against torch's own operations."""

from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
from linears import TINY
from timing import Arm, Case
from torch import Tensor
from torch.nn import functional as F

from crumb.kernels.geglu import geglu
from crumb.kernels.group_norm_silu import group_norm_silu
from crumb.kernels.layer_norm import layer_norm

GROUPS = 32
Inputs = tuple[Tensor, ...]
"""x, and weight and bias where there are any."""


def cases(device: torch.device, dtype: torch.dtype, tiny: bool, everything: bool) -> Iterator[Case]:
    for rows, width, times in ((4096, 640, 30), (1024, 1280, 180)):
        size = (TINY[rows], TINY[width]) if tiny else (rows, width)
        yield _case(f"layer_norm {rows}x{width}", LAYER_NORM, partial(_inputs, device, dtype, size, True), times)
    for channels, side in ((320, 128), (960, 128), (640, 64), (1280, 32)):
        size = (1, channels // 10, 8, 8) if tiny else (1, channels, side, side)
        for layout in (torch.channels_last, torch.contiguous_format):
            name = f"group_norm_silu {channels}@{side}² {str(layout).removeprefix('torch.').removesuffix('_format')}"
            yield _case(name, GROUP_NORM_SILU, partial(_inputs, device, dtype, size, True, layout), 1)
    for rows, width, times in ((4096, 2560, 10), (1024, 5120, 60)):
        size = (TINY[rows], 2 * TINY[width]) if tiny else (rows, 2 * width)
        yield _case(f"geglu {rows}x{width}", GEGLU, partial(_inputs, device, dtype, size, False), times)


def _inputs(device: torch.device, dtype: torch.dtype, size: tuple[int, ...], is_norm: bool,
            layout: torch.memory_format = torch.contiguous_format) -> Inputs:
    generator = torch.Generator(device).manual_seed(sum(size))

    def random(*shape):
        return torch.randn(*shape, generator=generator, device=device)

    x = (random(*size) * 1.5 + 0.3).to(dtype).contiguous(memory_format=layout).requires_grad_()
    return (x, *((random(size[1]) * scale + start).to(dtype) for scale, start in ((0.2, 1), (0.2, 0)) if is_norm))


def _case(name: str, functions: dict[str, Callable], make: Callable[[], Inputs], times: int) -> Case:
    inputs = cache(make)
    exact = functions["torch"]
    return Case("norm", name, {arm: partial(_arm, function, exact, inputs) for arm, function in functions.items()}, times)


def _arm(function: Callable, exact: Callable, inputs: Callable[[], Inputs]) -> Arm:
    x, *affine = inputs()
    dy = torch.randn(*function(x, *affine).shape, generator=torch.Generator(x.device).manual_seed(1), device=x.device)
    layout = torch.channels_last if x.dim() == 4 and not x.is_contiguous() else torch.contiguous_format
    dy = dy.to(x.dtype).contiguous(memory_format=layout)

    def both():
        y = function(x, *affine)
        return y, *torch.autograd.grad(y, x, dy)

    def reference():
        wide = x.detach().double().requires_grad_()
        y = exact(wide, *(part.double() for part in affine))
        return {"y": y.detach(), "dX": torch.autograd.grad(y, wide, dy.double())[0]}

    return Arm({"forward": lambda: function(x, *affine), "forward+backward": both}, lambda: dict(zip(("y", "dX"), both())),
               affine, reference=reference)


def _torch_geglu(projected: Tensor) -> Tensor:
    hidden, gate = projected.chunk(2, -1)
    return hidden * F.gelu(gate)


def _under_autocast(function: Callable) -> Callable:
    """As most trainers run it: fp32 inside, with the cast back that the next linear or convolution makes."""
    def run(x, *affine):
        with torch.autocast(x.device.type, x.dtype):
            return function(x, *affine).to(x.dtype)
    return run


def _torch_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, 1e-5)


def _torch_group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, GROUPS, weight, bias, 1e-5))


LAYER_NORM = {"torch": _torch_layer_norm, "torch, autocast": _under_autocast(_torch_layer_norm),
              "crumb": lambda x, weight, bias: layer_norm(x, weight, bias, 1e-5)}
GROUP_NORM_SILU = {"torch": _torch_group_norm_silu, "torch, autocast": _under_autocast(_torch_group_norm_silu),
                   "crumb": lambda x, weight, bias: group_norm_silu(x, GROUPS, weight, bias, 1e-5)}
GEGLU = {"torch": _torch_geglu, "crumb": geglu}
