"""GroupNorm, SiLU and convolution as one node: gradients by finite differences, and what is kept."""

import pytest
import torch
from torch.nn import functional as F

from crumb.kernels.norm_conv import ConvLayer, norm_conv
from crumb.kernels.norm_linears import Norm
from crumb.kernels.quantize import Int8Weight

CHANNELS, GROUPS, RANK = 8, 4, 3


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def make(learns: bool, stride: int = 1, kind=None):
    norm = Norm(random(CHANNELS), random(CHANNELS, seed=1), 1e-5, GROUPS)
    factors = [random(RANK, CHANNELS, 3, 3).requires_grad_(), random(6, RANK, 1, 1).requires_grad_()] if learns else []
    weight = random(6, CHANNELS, 3, 3)
    return norm, ConvLayer(weight if kind is None else kind.of(weight), random(6), stride, 1, *factors, scaling=0.5), factors


def reference(x, norm, layer):
    weight = layer.weight if isinstance(layer.weight, torch.Tensor) else layer.weight.dequantised(x.dtype)
    activated = F.silu(F.group_norm(x, GROUPS, norm.weight, norm.bias, norm.eps))
    y = F.conv2d(activated, weight, layer.bias, layer.stride, layer.padding)
    if layer.lora_A is None:
        return y
    return y + layer.scaling * F.conv2d(F.conv2d(activated, layer.lora_A, None, layer.stride, layer.padding), layer.lora_B)


@pytest.mark.parametrize(("learns", "stride", "kind", "memory_format"), [
    (True, 1, None, torch.contiguous_format), (True, 2, None, torch.channels_last), (False, 1, None, torch.channels_last),
    (True, 1, Int8Weight, torch.channels_last)])
def test_gradients_equal_finite_differences(learns, stride, kind, memory_format):
    norm, layer, factors = make(learns, stride, kind)
    x = random(2, CHANNELS, 5, 4).to(memory_format=memory_format).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: norm_conv(x, norm, layer), (x, *factors))
    torch.testing.assert_close(norm_conv(x, norm, layer), reference(x, norm, layer))


def test_keeps_x_two_numbers_a_group_and_the_small_convolution():
    norm, layer, _ = make(True)
    x, kept = random(2, CHANNELS, 6, 6).requires_grad_(), {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(id(t), t), lambda t: t):
        norm_conv(x, norm, layer)
    assert sum(tensor.numel() for tensor in kept.values()) == x.numel() + 2 * 2 * GROUPS + 2 * RANK * 36
