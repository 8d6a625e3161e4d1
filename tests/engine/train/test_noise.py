"""Noise, noise levels and targets, each against a formula by hand or diffusers."""

from itertools import product

import pytest
import torch
from diffusers import DDPMScheduler

from crumb.engine.data.prepare import Batch
from crumb.engine.train.noise import alphas_cumprod, sample_noise, sample_timesteps, step_generator
from crumb.engine.train.step import draw


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_noise_offset_shifts_each_channel_by_its_own_constant(make_plan):
    plain = sample_noise((2, 4, 8, 8), seeded(), make_plan())
    shift = sample_noise((2, 4, 8, 8), seeded(), make_plan(noise_offset=0.1)) - plain
    assert torch.allclose(shift, shift[..., :1, :1].expand_as(shift), atol=1e-6)
    assert len(shift[..., 0, 0].flatten().unique()) == 8
    many = sample_noise((4096, 4, 1, 1), seeded(), make_plan(noise_offset=0.5))
    assert many.var().item() == pytest.approx(1 + 0.5**2, rel=0.05)


def test_multires_noise_has_the_weight_of_each_resolution(make_plan):
    """Mean over areas: fine noise averages out, coarse noise stays; its share follows from the discounts."""
    size, iterations, discount = 64, 8, 0.8
    noise = sample_noise((512, 4, size, size), seeded(), make_plan(multires_noise_iterations=iterations,
                                                                  multires_noise_discount=discount))
    deviations = noise.std(dim=(1, 2, 3))
    assert torch.allclose(deviations, torch.ones_like(deviations), atol=1e-5)
    coarse = noise.mean(dim=(2, 3)).var().item()
    plain = sample_noise((512, 4, size, size), seeded(), make_plan()).mean(dim=(2, 3)).var().item()
    weak = sample_noise((512, 4, size, size), seeded(), make_plan(multires_noise_iterations=iterations,
                                                                  multires_noise_discount=0.1)).mean(dim=(2, 3)).var().item()
    assert plain == pytest.approx(1 / size**2, rel=0.1)
    assert coarse > 50 * weak > 50 * plain, (coarse, weak, plain)
    fewer = sample_noise((512, 4, size, size), seeded(), make_plan(multires_noise_iterations=2, multires_noise_discount=0.8))
    assert fewer.mean(dim=(2, 3)).var().item() < coarse / 5


def test_multires_noise_by_hand_for_one_coarse_level(make_plan):
    """Two iterations on 4x4: the first is full-size noise again, the second is drawn at 1/r of the size and spread out."""
    made = sample_noise((1, 1, 4, 4), seeded(7), make_plan(multires_noise_iterations=2, multires_noise_discount=0.5))
    generator = seeded(7)
    total = torch.randn(1, 1, 4, 4, generator=generator, dtype=torch.float32)
    torch.rand((), generator=generator)
    total = total + torch.randn(1, 1, 4, 4, generator=generator)
    side = int(4 / (2 + 2 * torch.rand((), generator=generator).item()))
    assert side == 1, "choose a seed whose second draw lands on one cell, which is a constant"
    total = (total + 0.5 * torch.randn(1, 1, 1, 1, generator=generator)).double()
    assert torch.allclose(made.double(), total / total.std(), atol=1e-6)


def test_timesteps_stay_in_their_range_and_follow_their_distribution(make_plan):
    uniform = sample_timesteps(100_000, seeded(), make_plan())
    assert (uniform.min(), uniform.max()) == (0, 999)
    assert torch.histc(uniform.float(), 10, 0, 1000).sub(10_000).abs().max() < 400
    some = sample_timesteps(100_000, seeded(), make_plan(timestep_min=200, timestep_max=500))
    assert (some.min(), some.max()) == (200, 499)
    normal = sample_timesteps(100_000, seeded(), make_plan(timestep_sampling="logit_normal", logit_mean=0.5, logit_std=0.8))
    places = (normal.double() + 0.5) / 1000
    logits = torch.log(places / (1 - places))
    assert logits.mean().item() == pytest.approx(0.5, abs=0.02) and logits.std().item() == pytest.approx(0.8, abs=0.02)
    inside = sample_timesteps(10_000, seeded(), make_plan(timestep_sampling="logit_normal", timestep_min=990, logit_mean=9.0))
    assert inside.min() >= 990 and inside.max() == 999


@pytest.mark.parametrize(("prediction_type", "zero_terminal_snr"), list(product(("epsilon", "v_prediction"), (False, True))))
def test_noisy_latents_and_targets_are_diffusers(make_plan, prediction_type, zero_terminal_snr):
    plan = make_plan(prediction_type=prediction_type, zero_terminal_snr=zero_terminal_snr, input_perturbation=0.1)
    mean, std = torch.randn(6, 4, 8, 8, generator=seeded(2)), torch.rand(6, 4, 8, 8, generator=seeded(3))
    batch = Batch(mean, std, *[torch.zeros(6, 1)] * 4)
    noisy, target, timesteps = draw(batch, plan, alphas_cumprod(zero_terminal_snr), 0.13025, seeded(4))

    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                              prediction_type=prediction_type, rescale_betas_zero_snr=zero_terminal_snr)
    generator = seeded(4)
    latents = (mean + std * torch.randn(mean.shape, generator=generator)) * 0.13025
    noise = torch.randn(mean.shape, generator=generator)
    assert torch.equal(timesteps, torch.randint(0, 1000, (6,), generator=generator))
    perturbed = noise + 0.1 * torch.randn(mean.shape, generator=generator)
    torch.testing.assert_close(noisy, scheduler.add_noise(latents, perturbed, timesteps), rtol=1e-5, atol=1e-6)
    expected = noise if prediction_type == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)
    torch.testing.assert_close(target, expected, rtol=1e-5, atol=1e-6)


def test_every_pass_of_every_step_draws_its_own_noise():
    draws = [torch.randn(8, generator=step_generator(*numbers)) for numbers in product((1, 2), (0, 1), (0, 1))]
    assert len({tuple(draw.tolist()) for draw in draws}) == len(draws)
    assert torch.equal(draws[0], torch.randn(8, generator=step_generator(1, 0, 0)))
