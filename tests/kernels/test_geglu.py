"""GEGLU against float64, against finite differences and against diffusers' own layer; what its 8-bit form costs."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU

from crumb.kernels.geglu import (
    SCALE_BLOCK,
    geglu,
    geglu_backward,
    geglu_backward_int8,
    geglu_forward,
    geglu_forward_int8,
)

LIMITS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Relative error: a few roundings, 2⁻²⁴, 2⁻¹¹ and 2⁻⁸ each at most."""
SHAPES = [(77, 80), (1, 2), (3, 5, 2 * 515), (2, 2, 3, 2 * 64)]


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def exact(dh, projected):
    """h and d_projected in float64."""
    projected = projected.detach().double().requires_grad_()
    hidden, gate = projected.chunk(2, dim=-1)
    h = hidden * F.gelu(gate)
    return h.detach(), torch.autograd.grad(h, projected, dh.double())[0]


def relative_error(value, reference):
    return float((value.double() - reference.double()).norm() / reference.double().norm())


def assert_close(name, value, reference, limit):
    error = relative_error(value, reference)
    assert error < limit, f"{name} differs by {error:.2e}, allowed {limit:.0e}"


def test_gradients_equal_finite_differences():
    assert torch.autograd.gradcheck(geglu, random(2, 3, 10, dtype=torch.float64).requires_grad_())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_equals_float64(way, shape, dtype):
    projected = 3 * random(*shape, dtype=dtype)
    dh = random(*shape[:-1], shape[-1] // 2, dtype=dtype, seed=1)
    h = geglu_forward(projected)
    d_projected, h_again = geglu_backward(dh, projected)
    h_exact, d_exact = exact(dh, projected)
    assert (h.dtype, d_projected.dtype, h_again.dtype) == (dtype, dtype, dtype)
    assert d_projected.shape == projected.shape
    for name, value, reference in (("h", h, h_exact), ("h again", h_again, h_exact), ("d_projected", d_projected, d_exact)):
        assert_close(name, value, reference, LIMITS[dtype])


def test_plain_bf16_equals_float64():
    projected, dh = random(77, 80, dtype=torch.bfloat16), random(77, 40, dtype=torch.bfloat16, seed=1)
    h_exact, d_exact = exact(dh, projected)
    d_projected, h = geglu_backward(dh, projected)
    for name, value, reference in (("h", h, h_exact), ("d_projected", d_projected, d_exact)):
        assert_close(name, value, reference, LIMITS[torch.bfloat16])


def test_strided_inputs(way):
    projected = random(12, 7).T[:, ::2]  # 7 x 6
    dh = random(1, 1).expand(7, 3)
    h_exact, d_exact = exact(dh, projected)
    d_projected, h = geglu_backward(dh, projected)
    kept_h, kept = geglu_forward_int8(projected)
    for name, value, reference in (("h", h, h_exact), ("forward", geglu_forward(projected), h_exact),
                                   ("int8 forward", kept_h, h_exact), ("d_projected", d_projected, d_exact)):
        assert_close(name, value, reference, 1e-6)
    assert_close("int8 d_projected", geglu_backward_int8(dh, kept)[0], d_exact, 2e-2)


def test_gates_far_from_zero(way):
    """A gate of -300 shuts: zero, and no gradient; one of 300 lets through."""
    projected = torch.tensor([[2.0, 2.0, -300.0, 300.0]])
    d_projected, h = geglu_backward(torch.ones(1, 2), projected)
    torch.testing.assert_close(h, torch.tensor([[0.0, 600.0]]))
    torch.testing.assert_close(d_projected, torch.tensor([[0.0, 300.0, 0.0, 2.0]]))


def test_equals_diffusers():
    layer = GEGLU(12, 20)
    x = random(2, 9, 12).requires_grad_()
    theirs = layer(x)
    theirs_dx, = torch.autograd.grad(theirs.square().sum(), x)
    ours = geglu(layer.proj(x))
    ours_dx, = torch.autograd.grad(ours.square().sum(), x)
    assert_close("h", ours.detach(), theirs.detach(), 1e-6)
    assert_close("dx", ours_dx, theirs_dx, 1e-6)


def test_keeps_the_projection_alone(way):
    projected, saved = random(9, 64).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        geglu(projected)
    assert [t.data_ptr() for t in saved] == [projected.data_ptr()]


# 8 bits

def heavy_tailed(num_rows, d, dtype=torch.float32):
    """Student's t with 4 degrees of freedom, columns of different size, eight of them 30 times larger, mostly shut gates:
    the outliers that activations of transformers have. At most 200, so that products stay within fp16."""
    torch.manual_seed(0)
    values = torch.distributions.StudentT(4.0).sample((num_rows, 2 * d)) * torch.exp(0.5 * torch.randn(2 * d))
    values[:, d:] -= 1
    values[:, torch.randperm(2 * d)[:8]] *= 30
    return values.clamp_(-200, 200).to(dtype)


def error_of_scales_per_row(projected, dh):
    hidden, gate = projected.chunk(2, dim=-1)
    scales = [half.abs().amax(-1, keepdim=True) / 127 for half in (hidden, gate)]
    rounded = torch.cat([(half / scale).round() * scale for half, scale in zip((hidden, gate), scales)], dim=-1)
    return relative_error(exact(dh, rounded)[1], exact(dh, projected)[1])


def test_int8_costs_little_accuracy(way):
    projected, dh = heavy_tailed(16, 1280), random(16, 1280, seed=1)
    h_exact, d_exact = exact(dh, projected)
    h, kept = geglu_forward_int8(projected)
    d_projected, h_again = geglu_backward_int8(dh, kept)
    assert_close("h", h, h_exact, 1e-6)  # forward is exact, only backward sees codes
    per_row = error_of_scales_per_row(projected, dh)
    print(f"h {relative_error(h_again, h_exact):.4f}, d_projected {relative_error(d_projected, d_exact):.4f}, "
          f"d_projected with one scale a row {per_row:.4f}")
    assert_close("h of codes", h_again, h_exact, 0.02)
    assert_close("d_projected of codes", d_projected, d_exact, 0.02)
    assert per_row > 0.04, f"one scale a row would do: {per_row:.4f}"


def test_int8_takes_a_little_over_half_of_16_bit(way):
    projected = random(3, 2 * 640, dtype=torch.float16)
    _, kept = geglu_forward_int8(projected)
    assert kept.num_bytes == projected.numel() + 2 * projected.numel() // SCALE_BLOCK
    assert kept.num_bytes / projected.nbytes < 0.52


def test_int8_of_a_shut_gate_leaves_its_neighbours_alone(way):
    """-300 beside gates of about 1 would leave them 2 bits if it were not counted as -5."""
    projected = random(4, 128)
    projected[:, 64] = -300.0
    dh = torch.ones(4, 64)
    _, kept = geglu_forward_int8(projected)
    d_projected, _ = geglu_backward_int8(dh, kept)
    assert_close("d_projected", d_projected, exact(dh, projected)[1], 0.02)


@pytest.mark.parametrize("d", [1, 64, 100, 600])
def test_int8_of_any_width_and_of_zeros(way, d):
    projected = random(2, 2 * d, dtype=torch.float16)
    projected[1] = 0
    dh = random(2, d, dtype=torch.float16, seed=1)
    _, kept = geglu_forward_int8(projected)
    d_projected, h = geglu_backward_int8(dh, kept)
    h_exact, d_exact = exact(dh, projected)
    assert_close("h", h, h_exact, 0.03)
    assert_close("d_projected", d_projected, d_exact, 0.03)
    assert not h[1].any()


def test_int8_codes_are_the_same_both_ways(monkeypatch):
    pytest.importorskip("triton")
    projected, kept = heavy_tailed(4, 600, torch.float16), {}
    for name in ("plain", "triton"):
        monkeypatch.setenv("CRUMB_KERNELS", name)
        kept[name] = geglu_forward_int8(projected)[1]
    assert torch.equal(kept["plain"].scales, kept["triton"].scales)
    difference = (kept["plain"].codes.int() - kept["triton"].codes.int()).abs()
    assert difference.max() <= 1, f"codes differ by {difference.max()}"
    assert (difference > 0).float().mean() < 1e-2, "more differ than lie half way between two codes"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("num_rows", "d"), [(4096, 2560), (1024, 5120)])
def test_on_a_gpu(way, dtype, num_rows, d):
    projected = heavy_tailed(num_rows, d, dtype).cuda()
    dh = random(num_rows, d, dtype=dtype, seed=1).cuda()
    h_exact, d_exact = exact(dh, projected)
    d_projected, h_again = geglu_backward(dh, projected)
    h, kept = geglu_forward_int8(projected)
    d_of_codes, h_of_codes = geglu_backward_int8(dh, kept)
    for name, value, reference, limit in (
        ("forward", geglu_forward(projected), h_exact, LIMITS[dtype]), ("h again", h_again, h_exact, LIMITS[dtype]),
        ("d_projected", d_projected, d_exact, LIMITS[dtype]), ("int8 forward", h, h_exact, LIMITS[dtype]),
        ("h of codes", h_of_codes, h_exact, 0.03), ("d_projected of codes", d_of_codes, d_exact, 0.03),
    ):
        assert_close(name, value, reference, limit)
