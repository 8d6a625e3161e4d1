"""group_norm_silu against torch's own in float64, finite differences and diffusers' ResnetBlock2D."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D

from crumb.kernels.dispatch import uses_triton
from crumb.kernels.group_norm_silu import (
    group_norm_silu,
    group_norm_silu_again,
    group_norm_silu_backward,
    group_norm_silu_forward,
)

LIMITS = {torch.float32: 2e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}
"""Relative error: sums in fp32, and a few roundings of 2⁻²⁴, 2⁻¹¹ and 2⁻⁸ at most."""
EPS = 1e-5
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.fixture(params=FORMATS)
def memory_format(request):
    return FORMATS[request.param]


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make(shape, dtype):
    """x with groups of different mean and deviation, weight, bias, dy."""
    channels = torch.arange(shape[1], dtype=torch.float64).view(1, -1, *[1] * (len(shape) - 2))
    x = random(*shape, dtype=torch.float64) * (1 + channels / shape[1]) + torch.sin(channels)
    return (x.to(dtype), random(shape[1], dtype=dtype, seed=1), random(shape[1], dtype=dtype, seed=2),
            random(*shape, dtype=dtype, seed=3))


def exact(x, num_groups, weight, bias, dy, activation):
    """y and dx in float64."""
    x = x.detach().double().requires_grad_()
    y = F.group_norm(x, num_groups, weight.double(), bias.double(), EPS)
    y = F.silu(y) if activation else y
    return y.detach(), torch.autograd.grad(y, x, dy.double())[0]


def assert_close(name, value, reference, limit):
    error = float((value.double() - reference.double()).norm() / reference.double().norm())
    assert error < limit, f"{name} differs by {error:.2e}, allowed {limit:.0e}"


def assert_all_close(x, num_groups, weight, bias, dy, limit, activation=True):
    y_exact, dx_exact = exact(x, num_groups, weight, bias, dy, activation)
    y, mean, rstd = group_norm_silu_forward(x, num_groups, weight, bias, EPS, activation)
    assert (mean.shape, rstd.shape) == ((x.shape[0], num_groups),) * 2
    if not x.is_cuda or uses_triton("group_norm_silu", x):  # torch's own on a GPU keeps them as it keeps x
        assert (mean.dtype, rstd.dtype) == (torch.float32,) * 2
    again = group_norm_silu_again(x, mean, rstd, weight, bias, activation)
    dx = group_norm_silu_backward(dy, x, mean, rstd, weight, bias, activation)
    for name, value, reference in (("y", y, y_exact), ("y again", again, y_exact), ("dx", dx, dx_exact)):
        assert value.dtype == x.dtype
        assert_close(name, value, reference, limit)
    return y, again, dx


@pytest.mark.parametrize("activation", [True, False])
def test_gradients_equal_finite_differences(memory_format, activation):
    x, weight, bias, _ = make((2, 6, 2, 3), torch.float64)
    x = x.contiguous(memory_format=memory_format).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: group_norm_silu(x, 3, weight, bias, EPS, activation), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("shape", "num_groups"), [
    ((1, 160, 12, 12), 16), ((2, 64, 5, 7), 8), ((2, 40, 3, 50), 4), ((1, 96, 1, 1), 32), ((1, 70, 20, 20), 7)])
def test_equals_float64_in_either_memory_format(way, memory_format, shape, num_groups, dtype):
    x, weight, bias, dy = make(shape, dtype)
    x, dy = x.contiguous(memory_format=memory_format), dy.contiguous(memory_format=memory_format)
    for result in assert_all_close(x, num_groups, weight, bias, dy, LIMITS[dtype]):
        assert result.stride() == x.stride()


def test_without_activation(way, memory_format):
    x, weight, bias, dy = make((2, 64, 5, 7), torch.float32)
    x = x.contiguous(memory_format=memory_format)
    assert_all_close(x, 8, weight, bias, dy, LIMITS[torch.float32], activation=False)


def test_plain_bf16_equals_float64(memory_format):
    x, weight, bias, dy = make((1, 64, 12, 12), torch.bfloat16)
    assert_all_close(x.contiguous(memory_format=memory_format), 32, weight, bias, dy, LIMITS[torch.bfloat16])


def test_16_bit_x_under_an_fp32_affine_part(way, memory_format):
    x, weight, bias, dy = make((1, 64, 5, 5), torch.float16)
    x = x.contiguous(memory_format=memory_format)
    assert_all_close(x, 32, weight.float() * 1.0001, bias.float(), dy, LIMITS[torch.float16])


def test_strided_inputs_and_gradients_of_another_memory_format(way):
    x, weight, bias, dy = make((1, 64, 6, 8), torch.float32)
    assert_all_close(x[..., ::2], 8, weight, bias, dy[..., :1].expand(-1, -1, -1, 4), LIMITS[torch.float32])
    _, _, dx = assert_all_close(x.to(memory_format=torch.channels_last), 8, weight, bias, dy, LIMITS[torch.float32])
    assert dx.is_contiguous(memory_format=torch.channels_last)


def test_sequences(way):
    """(B, C, L) as the VAE's attention has them."""
    x, weight, bias, dy = make((2, 64, 9), torch.float32)
    assert_all_close(x, 8, weight, bias, dy, LIMITS[torch.float32])


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # numpy's, of sigmoid beyond the edges
def test_a_mean_far_from_zero(way, memory_format):
    """Squares of x minus the square of its mean would leave nothing of the variance: 1000² and 1 need 20 bits apart."""
    x, weight, bias, dy = make((1, 64, 20, 20), torch.float32)
    x = (x + 1000).contiguous(memory_format=memory_format)
    assert_all_close(x, 32, weight, bias, dy, 2e-4)  # the mean of fp32 numbers of 1000 is known to 2⁻²⁴ · 1000


def test_the_sum_of_a_group_exceeds_fp16(way, memory_format):
    x, weight, bias, dy = make((1, 32, 20, 20), torch.float16)
    x = (x * 100 + 1000).contiguous(memory_format=memory_format)
    assert_all_close(x, 4, weight, bias, dy, LIMITS[torch.float16])


def test_channels_that_do_not_divide_are_refused(way):
    x, weight, bias, _ = make((1, 60, 2, 2), torch.float32)
    with pytest.raises(ValueError, match="60 channels"):
        group_norm_silu(x, 32, weight, bias, EPS)


def test_equals_diffusers():
    block = ResnetBlock2D(in_channels=64, temb_channels=None, eps=1e-5)
    torch.nn.init.normal_(block.norm1.weight)
    x = make((2, 64, 5, 7), torch.float32)[0].requires_grad_()
    theirs = block.nonlinearity(block.norm1(x))
    ours = group_norm_silu(x, block.norm1.num_groups, block.norm1.weight, block.norm1.bias, block.norm1.eps)
    assert_close("y", ours.detach(), theirs.detach(), 1e-6)
    (theirs_dx,), (ours_dx,) = (torch.autograd.grad(y.square().sum(), x) for y in (theirs, ours))
    assert_close("dx", ours_dx, theirs_dx, 2e-6)


def test_keeps_x_uncopied_and_two_numbers_a_group(way, memory_format):
    x, weight, bias, _ = make((2, 64, 5, 7), torch.float16)
    x = x.contiguous(memory_format=memory_format).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        group_norm_silu(x, 32, weight, bias, EPS)
    known = {x.data_ptr(), weight.data_ptr(), bias.data_ptr()}
    assert known <= {t.data_ptr() for t in saved}
    assert sum(t.nbytes for t in saved if t.data_ptr() not in known) == 2 * 4 * 2 * 32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [
    (1, 320, 128, 128), (2, 960, 128, 128), (1, 1920, 64, 64), (1, 2560, 32, 32), (1, 640, 26, 38)])
def test_on_a_gpu(way, memory_format, dtype, shape):
    x, weight, bias, dy = (t.cuda() for t in make(shape, dtype))
    x, dy = x.contiguous(memory_format=memory_format), dy.contiguous(memory_format=memory_format)
    first, second = (assert_all_close(x, 32, weight, bias, dy, LIMITS[dtype]) for _ in range(2))
    for a, b in zip(first, second):
        assert torch.equal(a, b), "two runs differ"
