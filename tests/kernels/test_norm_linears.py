"""LayerNorm with its linears as one node: gradients by finite differences, and what is kept."""

import pytest
import torch
from torch.nn import functional as F

from crumb.kernels.linear import Layer
from crumb.kernels.norm_linears import Norm, norm_linears
from crumb.kernels.quantize import Int8Weight, NF4Weight

WIDTH, RANK = 24, 3


def random(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=dtype)


def make(widths: list[int], has_lora: list[bool]):
    norm = Norm(random(WIDTH), random(WIDTH, seed=1), 1e-5)
    factors = [tensor.requires_grad_() for width, learns in zip(widths, has_lora) if learns
               for tensor in (random(RANK, WIDTH, seed=width), random(width, RANK, seed=width))]
    left = iter(factors)
    layers = [Layer(random(width, WIDTH), random(width) if width % 2 else None, *((next(left), next(left)) if learns else ()),
                    scaling=0.7) for width, learns in zip(widths, has_lora)]
    return norm, layers, factors


def reference(x, norm, layers):
    normed = F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
    return tuple(F.linear(normed, layer.weight, layer.bias) + (
        0 if layer.lora_A is None else layer.scaling * (normed @ layer.lora_A.T) @ layer.lora_B.T) for layer in layers)


@pytest.mark.parametrize("has_lora", [[True, True, True], [True, False, True], [False]])
def test_gradients_equal_finite_differences(has_lora):
    norm, layers, factors = make([5, 4, 7][:len(has_lora)], has_lora)
    x = random(2, 3, WIDTH).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: norm_linears(x, norm, layers), (x, *factors))
    for found, expected in zip(norm_linears(x, norm, layers), reference(x, norm, layers)):
        torch.testing.assert_close(found, expected)


def test_a_result_that_nobody_uses_costs_no_gradient_of_its_own():
    norm, layers, factors = make([5, 4], [True, True])
    x = random(6, WIDTH).requires_grad_()
    norm_linears(x, norm, layers)[1].sum().backward()
    assert [factor.grad is None for factor in factors] == [True, True, False, False]
    found, x.grad = x.grad, None
    reference(x, norm, layers)[1].sum().backward()
    torch.testing.assert_close(found, x.grad)


@pytest.mark.parametrize("kind", [Int8Weight, NF4Weight])
def test_weights_of_any_format(kind):
    """Against plain torch on the dequantised weight; int8 rounds activations too, which is 1 to 3 %."""
    norm, layers, factors = make([64, 96], [True, True])
    norm, x = Norm(norm.weight.float(), norm.bias.float(), norm.eps), random(40, WIDTH, dtype=torch.float32).requires_grad_()
    factors = [factor.detach().float().requires_grad_() for factor in factors]
    weights = [kind.of(layer.weight.float()) for layer in layers]
    results = []
    for run, of in ((norm_linears, lambda weight: weight), (reference, lambda weight: weight.dequantised(torch.float32))):
        used = [Layer(of(weight), None, *factors[2 * i:2 * i + 2], 0.7) for i, weight in enumerate(weights)]
        x.grad = None
        for factor in factors:
            factor.grad = None
        outputs = run(x, norm, used)
        sum((y * random(*y.shape, dtype=torch.float32, seed=9)).sum() for y in outputs).backward()
        results.append([*(y.detach() for y in outputs), x.grad, *(factor.grad for factor in factors)])
    for found, expected in zip(*results):
        difference = ((found - expected).norm() / expected.norm()).item()
        assert difference < (0.03 if kind is Int8Weight else 1e-5), f"{difference:.1e}"


def test_keeps_x_two_numbers_a_row_and_the_small_products():
    norm, layers, _ = make([64, 64, 64], [True, True, True])
    x, kept = random(10, WIDTH).requires_grad_(), {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(id(t), t), lambda t: t):
        norm_linears(x, norm, layers)
    assert sum(tensor.numel() for tensor in kept.values()) == 10 * WIDTH + 2 * 10 + 3 * 10 * RANK
