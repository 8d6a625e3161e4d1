"""Frozen convolutions against torch's own."""

import pytest
import torch
from torch.nn import functional as F

from crumb.kernels.conv import conv2d_frozen
from crumb.kernels.quantize import Int8Weight

SHAPES = [  # in, out, kernel, stride, padding: ResBlock, shortcut, downsampler, odd
    (8, 16, 3, 1, 1), (8, 4, 1, 1, 0), (8, 8, 3, 2, 1), (3, 5, (3, 5), (2, 1), (1, 2))]


def make(shape, dtype=torch.float64):
    in_channels, out_channels, kernel, *_ = shape
    kernel = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)
                       for size in ((2, in_channels, 9, 10), (out_channels, in_channels, *kernel), (out_channels,)))
    return x.requires_grad_(), weight, bias


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_equals_torch_and_finite_differences(shape, bias):
    x, weight, bias_value = make(shape)
    settings = (weight, bias_value if bias else None, *shape[3:])
    y, expected = conv2d_frozen(x, *settings), F.conv2d(x, *settings)
    assert torch.equal(y, expected)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    torch.testing.assert_close(torch.autograd.grad(y, x, dy), torch.autograd.grad(expected, x, dy))
    assert torch.autograd.gradcheck(lambda x: conv2d_frozen(x, *settings), (x[:1, :, :5, :5].detach().requires_grad_(),))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_int8_equals_torch_on_the_dequantised_weight(shape, channels_last):
    x, weight, bias = make(shape, torch.float32)
    if channels_last:
        x = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    kept = Int8Weight.of(weight)
    settings = (bias, *shape[3:])
    y, expected = conv2d_frozen(x, kept, *settings), F.conv2d(x, kept.dequantised(torch.float32), *settings)
    torch.testing.assert_close(y, expected)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    if channels_last:
        dy = dy.to(memory_format=torch.channels_last)
    torch.testing.assert_close(torch.autograd.grad(y, x, dy), torch.autograd.grad(expected, x, dy))
    exact = F.conv2d(x.double(), weight.double(), bias.double(), *shape[3:])
    assert (y - exact).norm() / exact.norm() < 0.01


def saved_by(compute):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = compute()
    return saved, y


def test_keeps_nothing_where_torch_keeps_its_input():
    x, weight, bias = make(SHAPES[0])
    assert x.data_ptr() in {t.data_ptr() for t in saved_by(lambda: F.conv2d(x, weight, bias, padding=1))[0]}
    saved, y = saved_by(lambda: conv2d_frozen(x * 2, weight, bias, padding=1))
    assert not [t for t in saved if t.numel() > 1]
    y.sum().backward()
    assert x.grad is not None
    assert not saved_by(lambda: conv2d_frozen(x, Int8Weight.of(weight), bias, padding=1))[0]


def test_a_picture_that_needs_no_gradient_gets_none():
    x, weight, bias = make(SHAPES[0])
    bias.requires_grad_()  # only so that there is something to go backward through
    y = conv2d_frozen(x.detach(), weight, bias, padding=1)
    y.sum().backward()
    assert bias.grad is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(320, 320, 3, 1, 1), (960, 320, 3, 1, 1), (640, 640, 3, 2, 1), (960, 320, 1, 1, 0)])
def test_on_a_gpu_at_sizes_of_sdxl(dtype, channels_last, shape):
    in_channels, out_channels, kernel, stride, padding = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, in_channels, 64, 64, generator=generator).to("cuda", dtype)
    weight = (torch.randn(out_channels, in_channels, kernel, kernel, generator=generator) / 50).to("cuda", dtype)
    if channels_last:
        x, weight = x.to(memory_format=torch.channels_last), weight.to(memory_format=torch.channels_last)
    x.requires_grad_()
    kept = Int8Weight.of(weight)
    for y, dense in ((conv2d_frozen(x, weight, None, stride, padding), weight),
                     (conv2d_frozen(x, kept, None, stride, padding), kept.dequantised(dtype))):
        dy = torch.randn(y.shape, generator=generator).to("cuda", dtype)
        if channels_last:
            dy = dy.to(memory_format=torch.channels_last)
        dx, = torch.autograd.grad(y, x, dy)
        assert dx.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        wide = x.detach().double().requires_grad_()
        exact = F.conv2d(wide, dense.double(), None, stride, padding)
        exact_dx, = torch.autograd.grad(exact, wide, dy.double())
        for found, right in ((y, exact), (dx, exact_dx)):
            assert (found.double() - right).norm() / right.norm() < (2e-3 if dtype == torch.float16 else 8e-3)
