"""lora_linear_nf4: the same as lora_linear on the dequantised weight, with the kernel and without."""

import pytest
import torch

from crumb.kernels import lora_linear_nf4 as nf4
from crumb.kernels.linear import Layer, linear
from crumb.kernels.lora_linear import lora_linear
from crumb.kernels.lora_linear_nf4 import lora_linear_nf4
from crumb.kernels.quantize import NF4Weight


def make(num_rows, in_features, out_features, rank, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(rank)
    x, weight, bias, lora_A, lora_B, dy = (torch.randn(*shape, generator=generator).to(device) for shape in (
        (num_rows, in_features), (out_features, in_features), (out_features,), (rank, in_features), (out_features, rank),
        (num_rows, out_features)))
    return (x.to(dtype).requires_grad_(), NF4Weight.of(weight), bias.to(dtype), lora_A.requires_grad_(),
            lora_B.requires_grad_(), dy.to(dtype))


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 129), (65, 64), (130, 640)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_kernel_equals_plain_torch(monkeypatch, shape, dtype):
    weight = NF4Weight.of(torch.randn(*shape, generator=torch.Generator().manual_seed(0)))
    monkeypatch.setenv("CRUMB_KERNELS", "triton")
    assert torch.equal(nf4.dequantise(weight, dtype), weight.dequantised(dtype))


@pytest.mark.parametrize("way", ["plain", "triton"])
@pytest.mark.parametrize(("num_rows", "rank"), [(1, 1), (77, 16), (20, 128)])
def test_equals_lora_linear_on_the_dequantised_weight(monkeypatch, way, num_rows, rank):
    monkeypatch.setenv("CRUMB_KERNELS", way)
    x, weight, bias, lora_A, lora_B, dy = make(num_rows, 128, 70, rank)
    results = []
    for layer, kept in ((lora_linear_nf4, weight), (lora_linear, weight.dequantised(torch.float32))):
        y = layer(x, kept, bias, lora_A, lora_B, 0.5)
        results.append((y, *torch.autograd.grad(y, (x, lora_A, lora_B), dy)))
    for ours, right in zip(*results):
        assert torch.equal(ours, right)


def test_layers_take_turns_with_the_buffer():
    """Backward of the first layer comes after forward of the second, which has put its weight there."""
    x, first, _, *factors, _ = make(5, 64, 32, 4)
    _, second, _, *others, _ = make(5, 32, 96, 4)
    results = []
    for layer, weights in ((lora_linear_nf4, (first, second)),
                           (lora_linear, [w.dequantised(torch.float32) for w in (first, second)])):
        y = layer(layer(x, weights[0], None, *factors, 1.0), weights[1], None, *others, 1.0)
        results.append(torch.autograd.grad(y.square().sum(), (x, *factors, *others)))
    for ours, right in zip(*results):
        assert torch.equal(ours, right)
    assert nf4.dequantise(first, torch.float32).data_ptr() == nf4.dequantise(second, torch.float32).data_ptr()


def test_a_layer_without_a_lora_keeps_nothing():
    x, weight, bias, *_, dy = make(9, 128, 70, 4)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = linear(x, Layer(weight, bias))
    assert not saved
    dense = weight.dequantised(torch.float32)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, dense, bias))
    torch.testing.assert_close(torch.autograd.grad(y, x, dy)[0], dy @ dense)


def test_keeps_x_once():
    x, weight, bias, lora_A, lora_B, _ = make(100, 256, 512, 4, dtype=torch.bfloat16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_linear_nf4(x, weight, bias, lora_A, lora_B, 1.0)
    factors = {lora_A.data_ptr(), lora_B.data_ptr()}
    assert sum(t.nbytes for t in saved if t.data_ptr() not in factors) == 2 * (100 * 256 + 100 * 4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4096, 640, 5120), (1024, 5120, 1280), (77, 2048, 640)])
def test_on_a_gpu_at_sizes_of_sdxl(dtype, shape):
    x, weight, bias, lora_A, lora_B, dy = make(*shape, 16, dtype, "cuda")
    # A GPU multiplies and adds with one rounding where plain torch has two: 2 of 100,000 weights get the next 16-bit number.
    found, plain = nf4.dequantise(weight, dtype), weight.dequantised(dtype)
    assert (found != plain).float().mean() < 1e-3
    torch.testing.assert_close(found, plain, rtol=2 * torch.finfo(dtype).eps, atol=0)
    y = lora_linear_nf4(x, weight, bias, lora_A, lora_B, 0.5)
    found = y, *torch.autograd.grad(y, (x, lora_A, lora_B), dy)
    wide = [t.detach().double().requires_grad_() for t in (x, lora_A.to(dtype), lora_B.to(dtype))]
    exact = lora_linear(wide[0], weight.dequantised(torch.float64), bias.double(), *wide[1:], 0.5)
    for ours, right in zip(found, (exact, *torch.autograd.grad(exact, wide, dy.double()))):
        assert (ours.double() - right).norm() / right.norm() < (2e-3 if dtype == torch.float16 else 1e-2)
