"""Noise, timesteps and targets of one training step, each a plain function of tensors and a generator.

B batch, C latent channels, H W latent height and width. Everything here is fp32.
"""

import hashlib

import torch
from torch import Tensor
from torch.nn import functional as F

from crumb.profiles.plan import Plan

NUM_TIMESTEPS = 1000
BETA_START, BETA_END = 0.00085, 0.012


def alphas_cumprod(zero_terminal_snr: bool) -> Tensor:
    """SDXL's noise schedule, (1000,) fp32: betas whose square roots rise evenly ("scaled linear").

    With `zero_terminal_snr` the last step is pure noise (Lin et al. 2023, algorithm 1).
    """
    betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, NUM_TIMESTEPS, dtype=torch.float32) ** 2
    products = torch.cumprod(1 - betas, dim=0)
    if not zero_terminal_snr:
        return products
    roots = products.sqrt()
    first, last = roots[0].clone(), roots[-1].clone()
    return ((roots - last) * first / (first - last)) ** 2


def step_generator(seed: int, step: int, micro_step: int) -> torch.Generator:
    """The random numbers of one forward pass, on the CPU so that every device draws the same.

    A function of the step alone: a resumed run needs no saved generator state.
    """
    digest = hashlib.sha256(f"crumb step {seed} {step} {micro_step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7]))


def sample_noise(shape: torch.Size, generator: torch.Generator, plan: Plan) -> Tensor:
    """Gaussian noise; the offset adds a constant per picture and channel (NOISE-OFFSET; Guttenberg 2023)."""
    noise = torch.randn(shape, generator=generator)
    if plan.noise_offset:
        noise += plan.noise_offset * torch.randn(shape[0], shape[1], 1, 1, generator=generator)
    if plan.multires_noise_iterations:
        noise = add_coarse_noise(noise, plan.multires_noise_iterations, plan.multires_noise_discount, generator)
    return noise


def add_coarse_noise(noise: Tensor, iterations: int, discount: float, generator: torch.Generator) -> Tensor:
    """Adds noise of ever lower resolution, each picture's sum scaled back to a deviation of 1 (NOISE-MULTIRES; Whitaker 2023).

    Iteration i is drawn at 1 / rⁱ of the size, r new each time between 2 and 4, and counts discountⁱ. The first whose
    shorter side is a single value is the last, as in sd-scripts, whose presets are in use; it divides by one deviation of
    the whole batch, which would make a picture's noise depend on its company.
    """
    height, width = noise.shape[-2:]
    for i in range(iterations):
        shrink = (2 + 2 * torch.rand((), generator=generator).item()) ** i
        size = max(1, int(height / shrink)), max(1, int(width / shrink))
        coarse = torch.randn(*noise.shape[:2], *size, generator=generator)
        noise = noise + discount**i * F.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)
        if 1 in size:
            break
    return noise / noise.std(dim=(1, 2, 3), keepdim=True)


def sample_timesteps(batch_size: int, generator: torch.Generator, plan: Plan) -> Tensor:
    """(B,) int64 from timestep_min to timestep_max - 1: uniform, or the sigmoid of a normal (Esser et al. 2024, eq. 19)."""
    if plan.timestep_sampling == "uniform":
        return torch.randint(plan.timestep_min, plan.timestep_max, (batch_size,), generator=generator)
    places = torch.sigmoid(plan.logit_mean + plan.logit_std * torch.randn(batch_size, generator=generator))
    timesteps = plan.timestep_min + (places * (plan.timestep_max - plan.timestep_min)).long()
    return timesteps.clamp(max=plan.timestep_max - 1)  # a sigmoid can round to 1


def add_noise(latents: Tensor, noise: Tensor, timesteps: Tensor, schedule: Tensor) -> Tensor:
    """sqrt(ā) x + sqrt(1 - ā) ε (Ho et al. 2020, equation 4)."""
    alpha = schedule[timesteps].view(-1, 1, 1, 1)
    return alpha.sqrt() * latents + (1 - alpha).sqrt() * noise


def prediction_target(latents: Tensor, noise: Tensor, timesteps: Tensor, schedule: Tensor, prediction_type: str) -> Tensor:
    """What the U-Net should answer: ε, or v = sqrt(ā) ε - sqrt(1 - ā) x (Salimans & Ho 2022)."""
    if prediction_type == "epsilon":
        return noise
    alpha = schedule[timesteps].view(-1, 1, 1, 1)
    return alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
