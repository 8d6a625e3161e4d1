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


def spread(coarse: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Bilinear by its definition: value i of N stands at (i + 1/2) n / N - 1/2 among the n it is made of, held at the ends."""
    for dim, large in ((-2, size[0]), (-1, size[1])):
        small = coarse.shape[dim]
        places = ((torch.arange(large) + 0.5) * small / large - 0.5).clamp(0, small - 1)
        below, above = places.floor().long(), places.ceil().long()
        share = (places - below).double().view((-1, 1) if dim == -2 else (-1,))
        coarse = coarse.index_select(dim, below) * (1 - share) + coarse.index_select(dim, above) * share
    return coarse


@pytest.mark.parametrize("iterations", [2, 3, 64])
@pytest.mark.parametrize(("height", "width"), [(24, 80), (80, 24)])
def test_multires_noise_by_hand_for_many_levels(make_plan, iterations, height, width):
    """sd-scripts' pyramid_noise_like, with one deviation a picture: it ends behind the first level that is one value wide."""
    discount, seed = 0.7, 25
    made = sample_noise(torch.Size((2, 4, height, width)), seeded(seed), make_plan(
        multires_noise_iterations=iterations, multires_noise_discount=discount))
    generator, sizes = seeded(seed), []
    total = torch.randn(2, 4, height, width, generator=generator).double()
    for i in range(iterations):
        r = torch.rand((), generator=generator).item() * 2 + 2
        sizes.append((max(1, int(height / r**i)), max(1, int(width / r**i))))
        total += spread(torch.randn(2, 4, *sizes[-1], generator=generator).double(), (height, width)) * discount**i
        if sizes[-1][0] == 1 or sizes[-1][1] == 1:
            break
    assert [min(size) for size in sizes] == [24, 10, 4, 2, 1][:iterations] and (len(sizes) < 5 or max(sizes[-1]) > 1), (
        f"choose a seed with several levels, of which the last is a line and no point: {sizes}")
    expected = torch.stack([picture / picture.std() for picture in total])
    difference = (made.double() - expected).abs().max().item()
    assert difference < 1e-5, difference


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
