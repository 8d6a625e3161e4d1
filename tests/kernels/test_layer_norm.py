"""layer_norm against torch's own in float64 and against finite differences."""

import pytest
import torch
import torch.nn.functional as F

from crumb.kernels.layer_norm import MAX_WIDTH, layer_norm, layer_norm_again, layer_norm_backward, layer_norm_forward

LIMITS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Relative error: sums in fp32, and a few roundings of 2⁻²⁴, 2⁻¹¹ and 2⁻⁸ at most."""
EPS = 1e-5


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make(shape, dtype):
    """x, weight, bias, dy, and the gradient of the residual stream."""
    width = shape[-1]
    return (2 * random(*shape, dtype=dtype) + 0.5, random(width, dtype=dtype, seed=1), random(width, dtype=dtype, seed=2),
            random(*shape, dtype=dtype, seed=3), random(*shape, dtype=dtype, seed=4))


def exact(x, weight, bias, dy):
    """y and dx in float64."""
    x = x.detach().double().requires_grad_()
    y = F.layer_norm(x, x.shape[-1:], weight.double(), bias.double(), EPS)
    return y.detach(), torch.autograd.grad(y, x, dy.double())[0]


def assert_close(name, value, reference, limit):
    error = float((value.double() - reference.double()).norm() / reference.double().norm())
    assert error < limit, f"{name} differs by {error:.2e}, allowed {limit:.0e}"


def assert_all_close(x, weight, bias, dy, add, limit):
    y_exact, dx_exact = exact(x, weight, bias, dy)
    y, mean, rstd = layer_norm_forward(x, weight, bias, EPS)
    assert (mean.shape, rstd.shape) == ((*x.shape[:-1], 1),) * 2
    assert (mean.dtype, rstd.dtype) == (torch.float32,) * 2
    again = layer_norm_again(x, mean, rstd, weight, bias)
    dx = layer_norm_backward(dy, x, mean, rstd, weight)
    dx_added = layer_norm_backward(dy, x, mean, rstd, weight, add)
    assert {y.dtype, again.dtype, dx.dtype, dx_added.dtype} == {x.dtype}
    for name, value, reference in (("y", y, y_exact), ("y again", again, y_exact), ("dx", dx, dx_exact),
                                   ("dx + add", dx_added, dx_exact + add.double())):
        assert_close(name, value, reference, limit)


def test_gradients_equal_finite_differences():
    x, weight, bias, *_ = make((2, 3, 7), torch.float64)
    assert torch.autograd.gradcheck(lambda x: layer_norm(x, weight, bias, EPS), x.requires_grad_())


@pytest.mark.parametrize("shape", [(77, 640), (5, 1280), (1, 768), (2, 3, 33), (9, 5), (1, MAX_WIDTH + 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_equals_float64(way, shape, dtype):
    assert_all_close(*make(shape, dtype), LIMITS[dtype])


def test_plain_bf16_equals_float64():
    assert_all_close(*make((77, 640), torch.bfloat16), LIMITS[torch.bfloat16])


def test_16_bit_x_under_an_fp32_affine_part(way):
    x, weight, bias, dy, add = make((5, 64), torch.float16)
    assert_all_close(x, weight.float() * 1.0001, bias.float(), dy, add, LIMITS[torch.float16])


def test_strided_inputs(way):
    _, weight, bias, dy, add = make((6, 40), torch.float32)
    x, dy, add = random(40, 12).T[::2], dy[:, :1].expand(6, 40), add.T.contiguous().T
    assert_all_close(x, weight, bias, dy, add, LIMITS[torch.float32])


def test_a_mean_far_from_zero(way):
    """Squares of x minus the square of its mean would leave nothing of the variance: 1000² and 1 need 20 bits apart."""
    x, weight, bias, dy, add = make((4, 640), torch.float32)
    assert_all_close(x + 1000, weight, bias, dy, add, 1e-4)  # x itself has 2⁻²⁴ · 1000 of its deviation 2


def test_the_sum_of_a_row_exceeds_fp16(way):
    x, weight, bias, dy, add = make((2, 1280), torch.float16)
    assert_all_close(x * 100 + 500, weight, bias, dy, add, LIMITS[torch.float16])


def test_keeps_x_and_two_numbers_a_row(way):
    x, weight, bias, *_ = make((9, 64), torch.float16)
    x.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer_norm(x, weight, bias, EPS)
    known = {x.data_ptr(), weight.data_ptr()}
    assert known <= {t.data_ptr() for t in saved}
    assert sum(t.nbytes for t in saved if t.data_ptr() not in known) == 2 * 4 * 9


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 4096, 640), (2, 1024, 1280), (77, 768), (3, 4096), (3, 5000)])
def test_on_a_gpu(way, dtype, shape):
    assert_all_close(*(t.cuda() for t in make(shape, dtype)), LIMITS[dtype])
