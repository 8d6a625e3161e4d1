"""lora_linear_int8: Triton's interpreter against plain torch, both against the formula in float64 by autograd."""

import math

import pytest
import torch

from crumb.kernels import lora_linear_int8 as int8
from crumb.kernels.linear import Layer, linear
from crumb.kernels.lora_linear import PRODUCTS as SIXTEEN_BIT
from crumb.kernels.lora_linear_int8 import GROUP, lora_linear_int8
from crumb.kernels.quantize import Int8Weight

ALL = (True, True, True)
SHAPES = [  # rows, in, out, rank: nothing a multiple of a tile, words, several tiles, one group and a bit
    (5, 40, 24, 1), (77, 200, 150, 16), (130, 256, 300, 8), (20, 130, 257, 128), (65, 128, 64, 64)]


def make(num_rows, in_features, out_features, rank, dtype=torch.float32, device="cpu", outliers=False):
    """x, weight, bias, A, B and dy; a few channels of x 20 to 60 times the others where asked for."""
    generator = torch.Generator().manual_seed(num_rows + rank)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    x, dy = random(num_rows, in_features), random(num_rows, out_features) * random(out_features).exp()
    if outliers:
        x[:, ::max(1, in_features // 6)] *= 40
    weight = random(out_features, in_features) * random(out_features, 1).mul(0.4).exp() / math.sqrt(in_features)
    lora_A, lora_B = (random(*shape) / math.sqrt(max(shape)) for shape in ((rank, in_features), (out_features, rank)))
    return (x.to(device, dtype), weight.to(device), random(out_features).to(device, dtype), lora_A.to(device),
            lora_B.to(device), dy.to(device, dtype))


def difference(found, right):
    return ((found.double() - right.double()).norm() / right.double().norm()).item()


def rounded(v, fold=1.0):
    """v · fold as int8 by groups of 128 sees it, over fold: written apart from the code, in float64."""
    out = v.double() * fold
    for group in out.split(GROUP, -1):
        step = group.abs().amax(-1, keepdim=True) / 127
        group.copy_(torch.where(step > 0, (group / step).add(0.5).floor() * step, 0.0))
    return out / fold


def by_autograd(x, weight, bias, lora_A, lora_B, scaling, dy):
    """y, dX, dA, dB of the formula in float64: gradients pass through the rounding of x, the LoRA sees nothing rounded."""
    dense, folds = weight.dequantised(torch.float64), weight.scales.double()
    x, lora_A, lora_B = (t.detach().double().requires_grad_() for t in (x, lora_A, lora_B))
    base = (x + (rounded(x.detach()) - x.detach())) @ dense.T + (0 if bias is None else bias.double())
    lora = scaling * (x @ lora_A.T @ lora_B.T)
    dx, = torch.autograd.grad(base, x, rounded(dy, folds))
    dx_lora, d_lora_A, d_lora_B = torch.autograd.grad(lora, (x, lora_A, lora_B), dy.double())
    return base + lora, dx + dx_lora, d_lora_A, d_lora_B


@pytest.mark.parametrize("way", ["plain", "triton"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_formula(monkeypatch, way, shape, bias):
    monkeypatch.setenv("CRUMB_KERNELS", way)
    x, dense, bias_value, lora_A, lora_B, dy = make(*shape)
    weight, bias_value = Int8Weight.of(dense), bias_value if bias else None
    leaves = [t.requires_grad_() for t in (x, lora_A, lora_B)]
    y = lora_linear_int8(x, weight, bias_value, lora_A, lora_B, 0.37)
    found = (y, *torch.autograd.grad(y, leaves, dy))
    expected = by_autograd(x, weight, bias_value, lora_A, lora_B, 0.37, dy)
    for name, ours, right in zip(("y", "dX", "dA", "dB"), found, expected):
        assert difference(ours, right) < 1e-5, name


@pytest.mark.parametrize("shape", SHAPES)
def test_triton_equals_plain_torch_in_fp16(monkeypatch, shape):
    x, dense, bias, lora_A, lora_B, dy = make(*shape, dtype=torch.float16)
    weight, results = Int8Weight.of(dense), {}
    for way in ("plain", "triton"):
        monkeypatch.setenv("CRUMB_KERNELS", way)
        y, down = int8.forward(x, weight, bias, lora_A, lora_B, 0.37)
        results[way] = y, down, *int8.backward(dy, x, down, weight, lora_A, lora_B, 0.37, ALL)
    for name, plain, triton in zip(("y", "s", "dX", "dA", "dB"), results["plain"], results["triton"]):
        assert triton.dtype == plain.dtype == (torch.float32 if name in ("dA", "dB") else torch.float16)
        assert difference(triton, plain) < 1e-3, name


def test_small_tiles_give_the_same(monkeypatch):
    """They are taken where large ones would leave processors idle."""
    monkeypatch.setenv("CRUMB_KERNELS", "triton")
    x, dense, bias, lora_A, lora_B, _ = make(77, 200, 150, 16)
    large, _ = int8.forward(x, Int8Weight.of(dense), bias, lora_A, lora_B, 0.5)
    monkeypatch.setattr(int8, "num_processors", lambda device: 100)
    small, _ = int8.forward(x, Int8Weight.of(dense), bias, lora_A, lora_B, 0.5)
    torch.testing.assert_close(small, large)


@pytest.mark.parametrize("way", ["plain", "triton"])
def test_a_layer_without_a_lora(monkeypatch, way):
    monkeypatch.setenv("CRUMB_KERNELS", way)
    x, dense, bias, lora_A, lora_B, dy = make(40, 200, 150, 4)
    weight = Int8Weight.of(dense)
    x.requires_grad_()
    y = linear(x, Layer(weight, bias))
    right, right_dx, *_ = by_autograd(x, weight, bias, lora_A, lora_B, 0.0, dy)
    assert difference(y, right) < 1e-5
    assert difference(torch.autograd.grad(y, x, dy)[0], right_dx) < 1e-5
    assert linear(x.detach(), Layer(weight, bias)).grad_fn is None


@pytest.mark.parametrize("outliers", [False, True])
def test_error_against_the_unquantised_weight(outliers):
    """Also where a few channels are 40 times the others; with one scale a row y would be off by 6 %."""
    x, dense, bias, lora_A, lora_B, dy = make(256, 1280, 640, 16, dtype=torch.bfloat16, outliers=outliers)
    weight = Int8Weight.of(dense)
    y, down = int8.forward(x, weight, bias, lora_A, lora_B, 1.0)
    dx, _, _ = int8.backward(dy, x, down, weight, lora_A, lora_B, 1.0, ALL)
    wide = [t.double() for t in (x, dense, bias, lora_A, lora_B)]
    x64 = wide[0].requires_grad_()
    exact = torch.nn.functional.linear(x64, *wide[1:3]) + x64 @ wide[3].T @ wide[4].T
    assert difference(y, exact) < 0.03
    assert difference(dx, torch.autograd.grad(exact, x64, dy.double())[0]) < 0.03


@pytest.mark.parametrize("way", ["plain", "triton"])
def test_ranks_beyond_the_kernels(monkeypatch, way):
    monkeypatch.setenv("CRUMB_KERNELS", way)
    x, dense, bias, lora_A, lora_B, dy = make(33, 100, 70, 160)
    weight = Int8Weight.of(dense)
    y, down = int8.forward(x, weight, bias, lora_A, lora_B, 0.5)
    found = y, *int8.backward(dy, x, down, weight, lora_A, lora_B, 0.5, ALL)
    for ours, right in zip(found, by_autograd(x, weight, bias, lora_A, lora_B, 0.5, dy)):
        assert difference(ours, right) < 1e-5


@pytest.mark.parametrize("way", ["plain", "triton"])
def test_rows_that_are_not_contiguous(monkeypatch, way):
    monkeypatch.setenv("CRUMB_KERNELS", way)
    x, dense, bias, lora_A, lora_B, _ = make(6 * 7, 130, 24, 4)
    weight = Int8Weight.of(dense)
    x = x.view(6, 7, 130)
    turned = x.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    straight = x.clone().requires_grad_()
    results = []
    for argument in (turned, straight):
        y = lora_linear_int8(argument, weight, bias, lora_A, lora_B, 1.0)
        y.sum().backward()  # the gradient of a sum is one number with strides of zero
        results.append((y, argument.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert results[0][1].shape == (6, 7, 130)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("way", ["plain", "triton"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows(monkeypatch, way, value):
    """Integers hold neither NaN nor infinity; a step gone wrong must be seen all the same, also without a LoRA."""
    monkeypatch.setenv("CRUMB_KERNELS", way)
    x, dense, *_, dy = make(20, 200, 150, 4)
    weight = Int8Weight.of(dense)
    x[3, 170], dy[5, 140] = value, value
    y, _ = int8.forward(x, weight, None, None, None, 0.0)
    dx, _, _ = int8.backward(dy, None, None, weight, None, None, 0.0, (True, False, False))
    for found, row in ((y, 3), (dx, 5)):
        assert not torch.isfinite(found[row]).any()
        assert torch.isfinite(found[torch.arange(20) != row]).all()


@pytest.mark.parametrize("way", ["plain", "triton"])
def test_zeros_and_no_rows_at_all(monkeypatch, way):
    monkeypatch.setenv("CRUMB_KERNELS", way)
    _, dense, bias, lora_A, lora_B, _ = make(1, 200, 150, 4)
    weight = Int8Weight.of(dense)
    y, down = int8.forward(torch.zeros(3, 200), weight, bias, lora_A, lora_B, 1.0)
    torch.testing.assert_close(y, bias.expand(3, -1))
    assert not down.any()
    y, down = int8.forward(torch.zeros(0, 200), weight, bias, lora_A, lora_B, 1.0)
    assert y.shape == (0, 150)
    assert int8.backward(y, torch.zeros(0, 200), down, weight, lora_A, lora_B, 1.0, ALL)[0].shape == (0, 200)


@pytest.mark.parametrize("way", ["plain", "triton"])
@pytest.mark.parametrize("needs", [(False, True, True), (True, False, True), (True, True, False), (False, True, False)])
def test_only_what_is_needed(monkeypatch, way, needs):
    monkeypatch.setenv("CRUMB_KERNELS", way)
    x, dense, _, lora_A, lora_B, dy = make(9, 40, 24, 4)
    weight = Int8Weight.of(dense)
    _, down = int8.forward(x, weight, None, lora_A, lora_B, 0.5)
    every = int8.backward(dy, x, down, weight, lora_A, lora_B, 0.5, ALL)
    some = int8.backward(dy, x if needs[1] else None, down if needs[2] else None, weight, lora_A, lora_B, 0.5, needs)
    for wanted, found, right in zip(needs, some, every):
        assert (found is None) != wanted
        if wanted:
            torch.testing.assert_close(found, right)


def saved_by(compute):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = compute()
    return saved, y


def test_keeps_x_once_and_the_weight_by_reference():
    x, dense, bias, lora_A, lora_B, dy = make(100, 256, 512, 4, dtype=torch.float16)
    weight = Int8Weight.of(dense)
    leaves = [t.requires_grad_() for t in (x, lora_A, lora_B)]
    saved, y = saved_by(lambda: lora_linear_int8(x, weight, bias, *leaves[1:], 1.0))
    factors = {lora_A.data_ptr(), lora_B.data_ptr()}
    assert sum(t.nbytes for t in saved if t.data_ptr() not in factors) == 2 * (100 * 256 + 100 * 4)
    before = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    weight.values, weight.scales = weight.values.clone(), weight.scales.clone()  # as after a trip to the host
    for one, other in zip(before, torch.autograd.grad(y, leaves, dy)):
        assert torch.equal(one, other)
    assert not saved_by(lambda: linear(x, Layer(weight, bias)))[0]


def test_factors_that_are_not_trained_cost_nothing():
    x, dense, bias, lora_A, lora_B, _ = make(100, 256, 512, 4)
    saved, y = saved_by(lambda: lora_linear_int8(x.requires_grad_(), Int8Weight.of(dense), bias, lora_A, lora_B, 1.0))
    assert {t.data_ptr() for t in saved} == {lora_A.data_ptr(), lora_B.data_ptr()}
    y.sum().backward()
    assert x.grad is not None


SDXL = [(4096, 640, 640), (1024, 1280, 1280), (77, 2048, 1280), (4096, 640, 5120), (4096, 2560, 640), (1024, 1280, 10240),
        (1024, 5120, 1280)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rank", [4, 16, 128])
@pytest.mark.parametrize("shape", SDXL)
def test_on_a_gpu_at_sizes_of_sdxl(dtype, rank, shape):
    """Against the formula with the same roundings: what is left is the 16 bits of the result (and of s and dS)."""
    x, dense, bias, lora_A, lora_B, dy = make(*shape, rank, dtype=dtype, device="cuda", outliers=True)
    weight = Int8Weight.of(dense)
    y, down = int8.forward(x, weight, bias, lora_A, lora_B, 0.5)
    found = y, *int8.backward(dy, x, down, weight, lora_A, lora_B, 0.5, ALL)
    right = by_autograd(x, weight, bias, lora_A.to(dtype), lora_B.to(dtype), 0.5, dy)
    for name, ours, exact in zip(("y", "dX", "dA", "dB"), found, right):
        assert difference(ours, exact) < (3e-3 if dtype == torch.float16 else 1e-2), name
    again, _ = int8.forward(x, weight, bias, lora_A, lora_B, 0.5)
    assert torch.equal(y, again)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_without_the_kernels_multiplies_dequantised(monkeypatch):
    monkeypatch.setenv("CRUMB_KERNELS", "plain")
    x, dense, bias, lora_A, lora_B, dy = make(77, 640, 1280, 16, dtype=torch.float16, device="cuda")
    weight = Int8Weight.of(dense)
    y, down = int8.forward(x, weight, bias, lora_A, lora_B, 0.5)
    found = y, *int8.backward(dy, x, down, weight, lora_A, lora_B, 0.5, ALL)
    full = weight.dequantised(torch.float16)
    y, down = SIXTEEN_BIT.forward(x, full, bias, lora_A, lora_B, 0.5)
    for ours, right in zip(found, (y, *SIXTEEN_BIT.backward(dy, x, down, full, lora_A, lora_B, 0.5, ALL))):
        assert torch.equal(ours, right)
