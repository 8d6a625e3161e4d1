"""Losses that can be compared over a run: the same pictures, the same noise, the same noise levels every time (LOSS)."""

import math
import random
from dataclasses import replace

import torch

from crumb.engine.faults import fault
from crumb.engine.train.loop import Trainer
from crumb.engine.train.noise import add_noise, prediction_target, step_generator
from crumb.engine.train.step import forward_loss
from crumb.engine.train.text import encode_batch
from crumb.profiles.plan import Plan
from crumb.profiles.verdict import Judged

NOISE_LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Where in the range of noise levels that the run trains."""
NUM_JUDGED = 8
"""Pictures of each kind that are measured; with five noise levels each, forty forward passes."""


def judge(trainer: Trainer, step: int) -> Judged:
    """Measures some training pictures and the held-out ones, without gradients."""
    fault(f"judge {step}")
    # Plain squares, whatever the run trains with, so that runs with the same noise levels and masks can be compared.
    plain = replace(trainer.plan, loss_type="l2", loss_weighting="none")
    losses = [mean_loss(trainer, _some(indices, plain.seed), plain) if indices else None
              for indices in (trainer.training_set.trained, trainer.training_set.held_out)]
    if not all(loss is None or math.isfinite(loss) for loss in losses):
        losses = [None, None]
    return Judged(step, *losses)


@torch.no_grad()
def mean_loss(trainer: Trainer, indices: list[int], plan: Plan) -> float:
    """Over all pictures and NOISE_LEVELS; at most as many at a time as train at a time, so that it fits where training fits."""
    losses, schedule, size = [], trainer.schedule, trainer.placement.fit.micro_batch or plan.batch_size
    levels = [plan.timestep_min + int(level * (plan.timestep_max - plan.timestep_min)) for level in NOISE_LEVELS]
    for index in indices:
        generator = step_generator(plan.seed, index, -2)
        for start in range(0, len(levels), size):
            timesteps = torch.tensor(levels[start:start + size])
            batch = trainer.training_set.batch([index] * len(timesteps))  # under its mask, as it is trained
            if trainer.encoders:
                batch = encode_batch(batch, trainer.encoders, plan, learns=False)
            latents = batch.latent_mean * trainer.scaling_factor
            noise = torch.randn(latents.shape, generator=generator)
            noisy_latents = add_noise(latents, noise, timesteps, schedule)
            target = prediction_target(latents, noise, timesteps, schedule, plan.prediction_type)
            losses.append(forward_loss(trainer.unet, batch, noisy_latents, target, timesteps, schedule, plan,
                                       trainer.placement))
    return torch.cat(losses).mean().item()


def _some(indices: list[int], seed: int) -> list[int]:
    chosen = random.Random(f"crumb judge {seed}").sample(indices, min(NUM_JUDGED, len(indices)))
    return sorted(chosen)
