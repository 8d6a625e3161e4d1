"""Several layers of the same rows: q, k and v of an int8 base share one quantisation, and compute what each computes alone."""

import pytest
import torch

from crumb.kernels import linear
from crumb.kernels import lora_linear_int8 as int8
from crumb.kernels.linear import Layer
from crumb.kernels.quantize import Int8Weight, NF4Weight

WIDTH = 200


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def difference(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def layers_of(kind, ranks: list[int], kept=None) -> list[Layer]:
    made = []
    for index, rank in enumerate(ranks):
        weight, bias = random(96 + 8 * index, WIDTH, seed=index), random(96 + 8 * index) if index else None
        factors = (random(rank, WIDTH, seed=index), random(len(weight), rank, seed=index)) if rank else (None, None)
        made.append(Layer(kind(weight), bias, *factors, 0.7, kept if rank else None))
    return made


@pytest.mark.parametrize("ranks", [[16, 16, 16], [4, 0, 7], [0, 0, 0], [5], [40, 40, 40], [64, 64, 64], [130, 16, 16]])
def test_each_computes_what_it_computes_alone(way, ranks):
    """Bit for bit, but for x Aᵀ: a product with more columns may be summed in another order. From 129 ranks on each is
    quantised for itself."""
    rows, layers = random(50, WIDTH), layers_of(Int8Weight.of, ranks)
    for layer, (y, down) in zip(layers, linear.forward_all(rows, layers)):
        alone, down_alone = linear.forward(rows, layer)
        if layer.lora_A is None:
            assert torch.equal(y, alone) and down is None
            continue
        gradients = [linear.backward(random(*y.shape, seed=3), rows, one, layer) for one in (down, down_alone)]
        for found, expected in zip((y, down, *gradients[0]), (alone, down_alone, *gradients[1])):
            assert difference(found, expected) < 1e-6


def test_with_dropout(way):
    kept = torch.rand(5, 10, 4, generator=torch.Generator().manual_seed(0)) > 0.4
    rows, layers = random(50, WIDTH), layers_of(Int8Weight.of, [4, 4, 4], kept)
    for layer, (y, down) in zip(layers, linear.forward_all(rows, layers)):
        alone, down_alone = linear.forward(rows, layer)
        assert difference(y, alone) < 1e-6 and difference(down, down_alone) < 1e-6
        assert not down.view(5, 10, 4)[~kept].any()


def test_rows_are_quantised_once(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("CRUMB_KERNELS", "triton")
    rows, calls, quantise = random(20, WIDTH), [], int8.quantise
    monkeypatch.setattr(int8, "quantise", lambda *given, **named: calls.append(1) or quantise(*given, **named))
    linear.forward_all(rows, layers_of(Int8Weight.of, [16, 16, 16]))
    assert len(calls) == 1
    for kind in (lambda weight: weight, NF4Weight.of):
        linear.forward_all(rows, layers_of(kind, [16, 16, 16]))
    assert len(calls) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("rank", [4, 16, 40])
@pytest.mark.parametrize(("num_rows", "width"), [(4096, 640), (1024, 1280)])
def test_on_a_gpu_at_sizes_of_sdxl(rank, num_rows, width):
    rows = random(num_rows, width).cuda().half()
    layers = [Layer(Int8Weight.of(random(width, width, seed=index).cuda().half()), None,
                    random(rank, width, seed=index).cuda(), random(width, rank, seed=index).cuda(), 0.5) for index in range(3)]
    for layer, (y, down) in zip(layers, linear.forward_all(rows, layers)):
        alone, down_alone = linear.forward(rows, layer)
        assert difference(y.float(), alone.float()) < 1e-3 and difference(down.float(), down_alone.float()) < 1e-3
