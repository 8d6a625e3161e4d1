"""One forward and backward pass, in the order of the arithmetic."""

import torch
from torch import Tensor

from crumb.engine.data.prepare import Batch
from crumb.engine.memory.placement import Placement
from crumb.engine.train.loss import diffusion_loss
from crumb.engine.train.noise import add_noise, prediction_target, sample_noise, sample_timesteps
from crumb.profiles.plan import Plan


def draw(batch: Batch, plan: Plan, schedule: Tensor, scaling_factor: float, generator: torch.Generator):
    """Latents, noise and timesteps of one pass, all on the CPU in fp32: (noisy_latents, target, timesteps)."""
    drawn = torch.randn(batch.latent_mean.shape, generator=generator)
    latents = (batch.latent_mean + batch.latent_std * drawn) * scaling_factor
    noise = sample_noise(latents.shape, generator, plan)
    timesteps = sample_timesteps(len(latents), generator, plan)
    shown = noise
    if plan.input_perturbation:  # the U-Net sees a little more noise than it must predict (Ning et al. 2023)
        shown = noise + plan.input_perturbation * torch.randn(noise.shape, generator=generator)
    noisy_latents = add_noise(latents, shown, timesteps, schedule)
    return noisy_latents, prediction_target(latents, noise, timesteps, schedule, plan.prediction_type), timesteps


def forward_loss(unet, batch: Batch, noisy_latents: Tensor, target: Tensor, timesteps: Tensor, schedule: Tensor, plan: Plan,
                 placement: Placement) -> Tensor:
    """The loss of each picture of one pass, (B,) fp32, with the graph for backward."""
    device, dtype = placement.device, placement.dtype
    model_pred = unet(
        noisy_latents.to(device, dtype),
        timesteps.to(device),
        encoder_hidden_states=batch.encoder_hidden_states.to(device, dtype),
        added_cond_kwargs={
            "text_embeds": batch.pooled.to(device, dtype),
            # fp32: bf16 has no room for sizes such as 1023, and the embedding below is made in fp32
            "time_ids": batch.time_ids.to(device),
        },
        return_dict=False,
    )[0]
    return diffusion_loss(model_pred, target.to(device), timesteps, schedule, plan, batch.masks)
