"""The loss of each kind and weighting against float64 by hand, diffusers' signal-to-noise ratio, and torch's own losses."""

import math

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from crumb.engine.train.loss import diffusion_loss
from crumb.engine.train.noise import alphas_cumprod
from crumb.profiles.errors import RequestError

TIMESTEPS = torch.tensor([0, 13, 250, 500, 875, 999])


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 4, 8, 8, generator=generator), torch.randn(6, 4, 8, 8, generator=generator)


def snr() -> torch.Tensor:
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return compute_snr(scheduler, TIMESTEPS).double()


def loss(pair, plan, masks=None) -> torch.Tensor:
    return diffusion_loss(*pair, TIMESTEPS, alphas_cumprod(plan.zero_terminal_snr), plan, masks)


def test_plain_loss_is_the_mean_square_of_each_picture(pair, make_plan):
    expected = torch.stack([torch.nn.functional.mse_loss(a.double(), b.double()) for a, b in zip(*pair)])
    torch.testing.assert_close(loss(pair, make_plan()).double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr(pair, make_plan, prediction_type, gamma):
    """As in diffusers' train_text_to_image_lora_sdxl.py: min(snr, gamma) / snr, over snr + 1 for v."""
    plan = make_plan(prediction_type=prediction_type, loss_weighting="min_snr", min_snr_gamma=gamma)
    divisor = snr() if prediction_type == "epsilon" else snr() + 1
    weights = torch.stack([snr(), torch.full_like(snr(), gamma)], dim=1).min(dim=1)[0] / divisor
    expected = loss(pair, make_plan()).double() * weights
    torch.testing.assert_close(loss(pair, plan).double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_debiased(pair, make_plan, prediction_type):
    plan = make_plan(prediction_type=prediction_type, loss_weighting="debiased")
    bounded = snr().clamp(max=1000)
    weights = 1 / bounded.sqrt() if prediction_type == "epsilon" else 1 / (bounded + 1)
    torch.testing.assert_close(loss(pair, plan).double(), loss(pair, make_plan()).double() * weights, rtol=1e-5, atol=0)


@pytest.mark.parametrize("schedule", ["constant", "exponential", "snr"])
@pytest.mark.parametrize("loss_type", ["huber", "smooth_l1"])
def test_huber_by_hand(pair, make_plan, loss_type, schedule):
    c0 = 0.2
    plan = make_plan(loss_type=loss_type, huber_c=c0, huber_schedule=schedule)
    for index, (ours, prediction, target) in enumerate(zip(loss(pair, plan), *pair)):
        t, sigma = TIMESTEPS[index].item(), snr()[index].item() ** -0.5
        c = {"constant": c0, "exponential": math.exp(t / 1000 * math.log(c0)),
             "snr": c0 + (1 - c0) / (1 + sigma) ** 2}[schedule]
        distance = 2 * (((prediction - target).double() ** 2 + c * c).sqrt() - c)
        expected = (distance * (c if loss_type == "huber" else 1)).mean().item()
        assert ours.item() == pytest.approx(expected, rel=2e-5), (t, c)


def test_huber_is_square_near_zero_and_straight_far_off(make_plan):
    small, large = torch.full((6, 1, 1, 1), 1e-3), torch.full((6, 1, 1, 1), 1e4)
    plan, zero = make_plan(loss_type="huber", huber_c=0.1, huber_schedule="constant"), torch.zeros(6, 1, 1, 1)
    assert loss((small, zero), plan)[0].item() == pytest.approx(1e-6, rel=1e-2)
    assert loss((large, zero), plan)[0].item() == pytest.approx(2 * 0.1 * 1e4, rel=1e-3)


def test_zero_terminal_snr_stays_finite_or_is_refused(pair, make_plan):
    for prediction_type in ("epsilon", "v_prediction"):
        plan = make_plan(zero_terminal_snr=True, prediction_type=prediction_type, loss_weighting="min_snr")
        assert loss(pair, plan).isfinite().all()
    assert loss(pair, make_plan(zero_terminal_snr=True, loss_type="huber")).isfinite().all()
    with pytest.raises(RequestError, match="debiased"):
        make_plan(zero_terminal_snr=True, loss_weighting="debiased")


def masks() -> torch.Tensor:
    """Soft ones, one of an eighth of the frame, one that is white all over."""
    drawn = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    drawn[1], drawn[2] = 0, 1
    drawn[1, :, 3] = 1
    return drawn


@pytest.mark.parametrize("floor", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("settings", [{}, {"loss_weighting": "min_snr"}, {"loss_type": "huber", "huber_schedule": "constant"}])
def test_masked_loss_is_the_mean_under_the_mask(pair, make_plan, floor, settings):
    """A weighted mean of what each place counts alone, summed up here in float64."""
    got = loss(pair, make_plan(mask_floor=floor, **settings), masks())
    for index in range(6):
        weights = floor + (1 - floor) * masks()[index, 0].double()
        total = 0.0
        for y in range(8):
            for x in range(8):
                place = [tensor[:, :, y:y + 1, x:x + 1] for tensor in pair]
                total += weights[y, x].item() * loss(place, make_plan(**settings))[index].double().item()
        assert got[index].item() == pytest.approx(total / weights.sum().item(), rel=1e-5), index


def test_what_lies_under_black_does_not_count_and_small_masks_keep_their_weight(pair, make_plan):
    prediction, target = (tensor.clone().requires_grad_() for tensor in pair)
    loss((prediction, target), make_plan(), masks()).sum().backward()
    assert (prediction.grad[1, :, :3] == 0).all() and (prediction.grad[1, :, 4:] == 0).all()
    assert loss(pair, make_plan(), masks())[2].item() == pytest.approx(loss(pair, make_plan())[2].item(), rel=1e-6)
    # An error that is everywhere alike gives the same loss and, in sum, the same gradient, however small the mask is.
    even = torch.ones(6, 4, 8, 8, requires_grad=True)
    loss((even, torch.zeros(6, 4, 8, 8)), make_plan(), masks()).sum().backward()
    torch.testing.assert_close(even.grad.flatten(1).sum(1), torch.full((6,), 2.0))
