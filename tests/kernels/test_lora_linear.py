"""lora_linear against finite differences in float64 and against PEFT's own LoRA layer."""

import pytest
import torch
from peft.tuners.lora import LoraConfig
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import nn

from crumb.kernels import lora_linear as products
from crumb.kernels.lora_linear import lora_linear, lora_linear_reference


def make(shape, in_features, out_features, rank, dtype, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def random(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    x = random(*shape, in_features).requires_grad_()
    weight, bias_value = random(out_features, in_features), random(out_features) if bias else None
    return x, weight, bias_value, random(rank, in_features).requires_grad_(), random(out_features, rank).requires_grad_()


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_equal_finite_differences(bias):
    arguments = make((2, 3), 5, 7, 4, torch.float64, bias)
    assert torch.autograd.gradcheck(lora_linear, (*arguments, 0.37))
    torch.testing.assert_close(lora_linear(*arguments, 0.37), lora_linear_reference(*arguments, 0.37))


@pytest.mark.parametrize(("shape", "rank"), [((77,), 1), ((2, 77), 16), ((5, 3, 9), 128)])
def test_equals_peft_in_fp32(shape, rank):
    x, weight, bias, lora_A, lora_B = make(shape, 48, 40, rank, torch.float32)
    base = nn.Linear(48, 40)
    base.weight.data, base.bias.data = weight, bias
    base.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=rank / 2)
    peft = PeftLinear(base, "default", config=config, r=rank, lora_alpha=rank / 2)
    peft.lora_A["default"].weight.data, peft.lora_B["default"].weight.data = lora_A.detach().clone(), lora_B.detach().clone()
    dy = torch.randn(*shape, 40, generator=torch.Generator().manual_seed(1))

    y = lora_linear(x, weight, bias, lora_A, lora_B, 0.5)
    y.backward(dy)
    x_peft = x.detach().clone().requires_grad_()
    y_peft = peft(x_peft)
    y_peft.backward(dy)
    for name, ours, theirs in (
        ("y", y, y_peft), ("dx", x.grad, x_peft.grad),
        ("dA", lora_A.grad, peft.lora_A["default"].weight.grad), ("dB", lora_B.grad, peft.lora_B["default"].weight.grad),
    ):
        difference = (ours - theirs).norm() / theirs.norm()
        assert difference < 1e-6, f"{name} differs by {difference:.2e}"


def test_fp32_masters_under_a_bf16_base():
    x, weight, bias, lora_A, lora_B = make((64,), 32, 32, 8, torch.float32)
    x16 = x.detach().bfloat16().requires_grad_()
    y = lora_linear(x16, weight.bfloat16(), bias.bfloat16(), lora_A, lora_B, 0.5)
    y.backward(torch.ones_like(y))
    assert (y.dtype, x16.grad.dtype, lora_A.grad.dtype, lora_B.grad.dtype) == (
        torch.bfloat16, torch.bfloat16, torch.float32, torch.float32)
    exact = lora_linear_reference(*(t.detach().double() for t in (x16, weight, bias, lora_A, lora_B)), 0.5)
    assert (y.double() - exact).norm() / exact.norm() < 1e-2  # bf16 keeps 8 bits


def test_keeps_x_once_and_nothing_of_the_output_size():
    x, weight, bias, lora_A, lora_B = make((100,), 64, 512, 4, torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_linear(x, weight, bias, lora_A, lora_B, 1.0)
    held = sum(t.numel() for t in saved if t.data_ptr() not in {weight.data_ptr(), lora_A.data_ptr(), lora_B.data_ptr()})
    assert held == 100 * 64 + 100 * 4


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True), (True, True, True)])
def test_backward_gives_what_is_needed(needs):
    x, weight, _, lora_A, lora_B = (t.detach() for t in make((9,), 48, 40, 4, torch.float64))
    y, down = products.forward(x, weight, None, lora_A, lora_B, 0.5)
    leaves = [t.clone().requires_grad_() for t in (x, lora_A, lora_B)]
    expected = torch.autograd.grad(lora_linear_reference(leaves[0], weight, None, *leaves[1:], 0.5).sum(), leaves)
    found = products.backward(torch.ones_like(y), x if needs[1] else None, down if needs[2] else None, weight, lora_A,
                              lora_B, 0.5, needs)
    for wanted, ours, right in zip(needs, found, expected):
        assert (ours is None) != wanted
        if wanted:
            torch.testing.assert_close(ours, right)


def test_forward_and_backward_without_a_lora():
    x, weight, bias, *_ = (t.detach() for t in make((9,), 48, 40, 4, torch.float64))
    y, down = products.forward(x, weight, bias, None, None, 0.0)
    torch.testing.assert_close(y, nn.functional.linear(x, weight, bias))
    assert down is None
    dx, d_lora_A, d_lora_B = products.backward(y, None, None, weight, None, None, 0.0, (True, False, False))
    torch.testing.assert_close(dx, y @ weight)
    assert d_lora_A is None and d_lora_B is None
