"""Layers under dropout: what is left out of x Aᵀ is left out of the result and of all gradients, for weights of every kind."""

import pytest
import torch
from torch.nn import functional as F

from crumb.kernels.feed_forward import feed_forward
from crumb.kernels.linear import Layer, linear
from crumb.kernels.norm_conv import ConvLayer, norm_conv
from crumb.kernels.norm_linears import Norm, norm_linears
from crumb.kernels.quantize import Int8Weight, NF4Weight

KINDS = {"plain": lambda weight: weight, "int8": Int8Weight.of, "nf4": NF4Weight.of}
BATCH, TOKENS, WIDTH = 3, 5, 64


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=dtype)


def mask(*shape, share: float = 0.4):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(sum(shape))) >= share


def difference(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [4, 130])
@pytest.mark.parametrize("per", ["value", "rank of a picture"])
@pytest.mark.parametrize("has_tokens", [True, False])
def test_a_linear_of_every_kind(way, kind, rank, per, has_tokens):
    """The frozen part as it computes alone, the LoRA's by autograd. At rank 130 int8 takes its way for large ranks."""
    num_tokens = TOKENS if has_tokens else 1
    kept = mask(BATCH, num_tokens if per == "value" else 1, rank)
    weight, bias = KINDS[kind](random(96, WIDTH)), random(96)
    x = random(*((BATCH, TOKENS, WIDTH) if has_tokens else (BATCH, WIDTH)))
    given = [tensor.requires_grad_() for tensor in (x, random(rank, WIDTH), random(96, rank))]
    dy = random(*x.shape[:-1], 96, seed=1)

    def by_autograd(x, lora_A, lora_B):
        down = (x.view(BATCH, num_tokens, WIDTH) @ lora_A.T * kept).view(*x.shape[:-1], rank)
        return linear(x, Layer(weight, bias)) + 0.7 * down @ lora_B.T

    results = []
    for compute in (lambda x, *factors: linear(x, Layer(weight, bias, *factors, 0.7, kept)), by_autograd):
        y = compute(*given)
        results.append((y, *torch.autograd.grad(y, given, dy)))
    for name, found, expected in zip(("y", "dX", "dA", "dB"), *results):
        assert difference(found, expected) < 1e-5, name


def double_layer(columns: int, rows: int, kept):
    factors = random(3, columns, dtype=torch.float64), random(rows, 3, dtype=torch.float64)
    return Layer(random(rows, columns, dtype=torch.float64) / columns**0.5, random(rows, dtype=torch.float64),
                 *(factor.requires_grad_() for factor in factors), 0.7, kept)


def by_definition(x, layer):
    down = (x @ layer.lora_A.T) * (1 if layer.kept is None else layer.kept)
    return F.linear(x, layer.weight, layer.bias) + layer.scaling * down @ layer.lora_B.T


def compare_in_double(compute, reference, given):
    results = []
    for function in (compute, reference):
        outputs = function()
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        loss = sum((output * random(*output.shape, dtype=torch.float64, seed=index)).sum()
                   for index, output in enumerate(outputs))
        results.append((*outputs, *torch.autograd.grad(loss, given)))
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected)


def test_a_norm_with_its_linears():
    """Values left out of one, ranks of a picture out of another, nothing out of the third."""
    norm = Norm(random(16, dtype=torch.float64), random(16, dtype=torch.float64), 1e-5)
    x = random(BATCH, TOKENS, 16, dtype=torch.float64).requires_grad_()
    layers = [double_layer(16, rows, kept) for rows, kept in
              ((6, mask(BATCH, TOKENS, 3)), (7, mask(BATCH, 1, 3)), (8, None))]

    def reference():
        normed = F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
        return tuple(by_definition(normed, layer) for layer in layers)
    given = [x, *(factor for layer in layers for factor in (layer.lora_A, layer.lora_B))]
    compare_in_double(lambda: norm_linears(x, norm, layers), reference, given)


def test_a_feed_forward_part():
    norm = Norm(random(8, dtype=torch.float64), random(8, dtype=torch.float64), 1e-5)
    x = random(BATCH, TOKENS, 8, dtype=torch.float64).requires_grad_()
    layer_in, layer_out = double_layer(8, 64, mask(BATCH, TOKENS, 3)), double_layer(32, 8, mask(BATCH, TOKENS, 3, share=0.7))

    def reference():
        normed = F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
        hidden, gate = by_definition(normed, layer_in).chunk(2, -1)
        return x + by_definition(hidden * F.gelu(gate), layer_out)
    given = [x, layer_in.lora_A, layer_in.lora_B, layer_out.lora_A, layer_out.lora_B]
    compare_in_double(lambda: feed_forward(x, norm, layer_in, layer_out), reference, given)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (2, 3, 1, 1)])
def test_a_norm_with_its_convolution(memory_format, shape):
    norm = Norm(random(8, dtype=torch.float64), random(8, dtype=torch.float64), 1e-5, 4)
    x = random(2, 8, 5, 4, dtype=torch.float64).to(memory_format=memory_format).requires_grad_()
    factors = [random(*sizes, dtype=torch.float64).requires_grad_() for sizes in ((3, 8, 3, 3), (6, 3, 1, 1))]
    layer = ConvLayer(random(6, 8, 3, 3, dtype=torch.float64), None, (1, 1), (1, 1), *factors, 0.7, mask(*shape))

    def reference():
        activated = F.silu(F.group_norm(x, 4, norm.weight, norm.bias, norm.eps))
        down = F.conv2d(activated, factors[0], padding=1) * layer.kept
        return F.conv2d(activated, layer.weight, padding=1) + 0.7 * F.conv2d(down, factors[1])
    compare_in_double(lambda: norm_conv(x, norm, layer), reference, [x, *factors])


def test_masks_are_saved_and_not_held_otherwise():
    """Recomputed activations take their masks with them."""
    norm = Norm(random(16, dtype=torch.float64), random(16, dtype=torch.float64), 1e-5)
    x, kept, saved = random(BATCH, TOKENS, 16, dtype=torch.float64), mask(BATCH, TOKENS, 3), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or 0, lambda _: None):
        y, = norm_linears(x, norm, [double_layer(16, 6, kept)])
    assert any(tensor is kept for tensor in saved)
    assert all(layer.kept is None for layer in y.grad_fn.layers)
