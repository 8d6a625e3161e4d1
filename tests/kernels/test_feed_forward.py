"""The feed-forward part as one node: gradients by finite differences, and what is kept of the projection."""

import pytest
import torch
from torch.nn import functional as F

from crumb.kernels.feed_forward import feed_forward
from crumb.kernels.linear import Layer
from crumb.kernels.norm_linears import Norm

WIDTH, RANK = 8, 2
HIDDEN = 4 * WIDTH


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def make(learns_in: bool, learns_out: bool):
    norm = Norm(random(WIDTH), random(WIDTH, seed=1), 1e-5)
    loras = [[random(RANK, columns), random(rows, RANK, seed=2)] if learns else [None, None]
             for learns, rows, columns in ((learns_in, 2 * HIDDEN, WIDTH), (learns_out, WIDTH, HIDDEN))]
    layers = [Layer(random(rows, columns) / columns**0.5, random(rows), *lora, scaling=0.5)
              for lora, rows, columns in zip(loras, (2 * HIDDEN, WIDTH), (WIDTH, HIDDEN))]
    factors = [factor.requires_grad_() for lora in loras for factor in lora if factor is not None]
    return norm, layers, factors


def linear(x, layer):
    y = F.linear(x, layer.weight, layer.bias)
    return y if layer.lora_A is None else y + layer.scaling * (x @ layer.lora_A.T) @ layer.lora_B.T


def reference(x, norm, layers):
    hidden, gate = linear(F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps), layers[0]).chunk(2, -1)
    return x + linear(hidden * F.gelu(gate), layers[1])


@pytest.mark.parametrize(("learns_in", "learns_out"), [(True, True), (True, False), (False, True), (False, False)])
def test_gradients_equal_finite_differences(learns_in, learns_out):
    norm, layers, factors = make(learns_in, learns_out)
    x = random(2, 3, WIDTH).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: feed_forward(x, norm, *layers), (x, *factors))
    torch.testing.assert_close(feed_forward(x, norm, *layers), reference(x, norm, layers))


def test_with_the_projection_kept_in_int8():
    """The result is exact; gradients are off by what rounding to one of 255 steps within 64 columns does."""
    norm, layers, factors = make(True, True)
    x = random(50, WIDTH).requires_grad_()
    results = []
    for keep_int8 in (False, True):
        y = feed_forward(x, norm, *layers, keep_int8)
        gradients = torch.autograd.grad((y * random(50, WIDTH, seed=5)).sum(), (x, *factors))
        results.append((y.detach(), gradients))
    assert torch.equal(results[0][0], results[1][0])
    differences = [((found - expected).norm() / expected.norm()).item()
                   for expected, found in zip(results[0][1], results[1][1])]
    assert max(differences) < 0.02 and min(differences[:-1]) > 0, differences
    assert differences[-1] == 0  # B's of the second linear needs nothing that was rounded


@pytest.mark.parametrize(("keep_int8", "projection_bytes"), [(False, 20 * 2 * HIDDEN * 8), (True, 20 * 2 * (HIDDEN + 2))])
def test_keeps_x_the_projection_and_little_else(keep_int8, projection_bytes):
    norm, layers, _ = make(True, True)
    x, kept = random(20, WIDTH).requires_grad_(), {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(id(t), t), lambda t: t):
        feed_forward(x, norm, *layers, keep_int8)
    assert sum(tensor.nbytes for tensor in kept.values()) == projection_bytes + 20 * 8 * (WIDTH + 2 + 2 * RANK)
