"""dA and dB are sums over all tokens: in fp32 however many bits what they sum has, for weights of every kind."""

import pytest
import torch

from crumb.kernels import linear
from crumb.kernels.linear import Layer
from crumb.kernels.lora_linear import down_gradient, sum_over_rows
from crumb.kernels.quantize import Int8Weight, NF4Weight

KINDS = {"plain": lambda weight: weight, "int8": Int8Weight.of, "nf4": NF4Weight.of}
FP16_LARGEST = torch.finfo(torch.float16).max


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def difference(found, expected):
    return ((found.double().cpu() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("kind", KINDS)
def test_sums_that_fp16_does_not_hold(kind):
    """Outliers alike in 300 tokens; scaled losses make gradients as large. The factors are fp32 masters."""
    rows, dy = random(300, 64) + 20, random(300, 96, seed=1) + 40
    lora_A, lora_B = random(4, 64) * 0.1 + 0.1, random(96, 4) * 0.02
    layer = Layer(KINDS[kind](random(96, 64).half()), None, lora_A, lora_B, 0.5)
    rows, dy = rows.half(), dy.half()
    _, down = linear.forward(rows, layer)
    dx, d_lora_A, d_lora_B = linear.backward(dy, rows, down, layer)
    d_down = down_gradient(dy, lora_B, 0.5)
    assert dx.dtype == torch.float16 and d_lora_A.dtype == d_lora_B.dtype == torch.float32
    assert d_lora_B.abs().max() > FP16_LARGEST
    assert difference(d_lora_B, 0.5 * dy.double().T @ down.double()) < 1e-6
    for found in (d_lora_A, linear.lora_A_gradient(dy, rows, layer)):
        assert difference(found, d_down.double().T @ rows.double()) < 1e-3  # int8's kernel rounds its own dS
    assert difference(linear.lora_A_gradient(dy, rows, layer), d_down.double().T @ rows.double()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_are_rounded_to_fp32(dtype):
    left, right = random(500, 24).to(dtype), random(500, 16, seed=2).to(dtype)
    found = sum_over_rows(left, right)
    assert found.dtype == torch.float32 and difference(found, left.double().T @ right.double()) < 1e-6


def test_wider_formats_stay_what_they_are():
    left, right = random(5, 3).double(), random(5, 2).double()
    assert torch.equal(sum_over_rows(left, right), left.T @ right)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rank", [4, 16, 128])
def test_on_a_gpu_at_sizes_of_sdxl(dtype, rank):
    """Also of a part of a wider matrix, as q, k and v have theirs."""
    dy, downs = ((random(4096, width, seed=width) + 5).cuda().to(dtype) for width in (640, 3 * rank))
    for down in (downs[:, rank:2 * rank].contiguous(), downs[:, rank:2 * rank]):
        found = sum_over_rows(dy, down)
        assert found.dtype == torch.float32 and found.max() > FP16_LARGEST
        assert difference(found, dy.double().cpu().T @ down.double().cpu()) < 1e-5
