"""Does this card compute convolutions in fp16? Many GTX 16 cards give NaN, by algorithms that cuDNN picks unasked.

pytorch/pytorch#58123 and #77955: letting cuDNN try its algorithms out (`cudnn.benchmark`) leads to others, which are right.
"""

import logging
import math
from collections.abc import Callable

import torch
from torch.nn import functional as F

from crumb.engine.memory.placement import Placement
from crumb.profiles.errors import RequestError

log = logging.getLogger("crumb")

SHAPES = ((320, 128), (640, 64), (1280, 32))
"""Channels and side of SDXL's 3x3 convolutions at 1024x1024, from the outermost level in."""

TOLERANCE = 0.01
"""Of the largest value; sums of 11,520 products of fp16 numbers, kept in fp32, are wrong by less than a thousandth."""


def settle_convolutions(placement: Placement, warn: Callable[[str], None]) -> None:
    """Sees to it that fp16 convolutions are right on this GPU, or says what to do: RequestError. Other placements pass.

    To be called after settle_torch, and before anything large is loaded.
    """
    if placement.device.type != "cuda" or placement.dtype != torch.float16 or _all_right(placement.device):
        return
    torch.backends.cudnn.benchmark = True
    card = torch.cuda.get_device_name(placement.device)
    if _all_right(placement.device):
        warn(f"{card} computes convolutions in fp16 wrongly in the way cuDNN chose first; cuDNN now tries its ways out, and "
             f"what it found is right. Runs of this plan may differ in the last digits.")
        return
    raise RequestError(f"{card} computes convolutions in fp16 wrongly, whatever way cuDNN takes. Set mixed_precision = \"no\" "
                       f"in the plan: fp32 takes more memory and works (guide: PREC-MIXED).")


def _all_right(device: torch.device) -> bool:
    errors = {shape: convolution_error(device, torch.float16, *shape) for shape in SHAPES}
    log.info("fp16 convolutions on %s against fp32: %s", device, errors)
    return max(errors.values()) <= TOLERANCE


def convolution_error(device: torch.device, dtype: torch.dtype, channels: int, side: int) -> float:
    """The largest error of a 3x3 convolution's result and gradients against fp32, over the largest value; inf for NaN."""
    generator = torch.Generator().manual_seed(channels)
    shapes = (1, channels, side, side), (channels, channels, 3, 3), (1, channels, side, side)
    x, weight, dy = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    exact = _forward_and_gradients(x.float(), weight.float() / (3 * channels**0.5), dy.float())
    tried = _forward_and_gradients(x, weight / (3 * channels**0.5), dy)
    return max(_relative_error(one, other) for one, other in zip(tried, exact, strict=True))


def _forward_and_gradients(x: torch.Tensor, weight: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """In the memory format that the U-Net has."""
    x, weight = (tensor.contiguous(memory_format=torch.channels_last).requires_grad_() for tensor in (x, weight))
    y = F.conv2d(x, weight, padding=1)
    return y.detach(), *torch.autograd.grad(y, (x, weight), dy.contiguous(memory_format=torch.channels_last))


def _relative_error(tried: torch.Tensor, exact: torch.Tensor) -> float:
    error = ((tried.float() - exact).abs().max() / exact.abs().max()).item()
    return error if math.isfinite(error) else math.inf
