"""Noise, timesteps and targets of one training step, each a plain function of tensors and a generator.

B batch, C latent channels, H W latent height and width. Everything here is fp32.
"""

import hashlib

import torch
from torch import Tensor

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


def sample_noise(shape: torch.Size, generator: torch.Generator, noise_offset: float) -> Tensor:
    """Gaussian noise; the offset adds a constant per picture and channel (NOISE-OFFSET; Guttenberg 2023)."""
    noise = torch.randn(shape, generator=generator)
    if noise_offset:
        noise += noise_offset * torch.randn(shape[0], shape[1], 1, 1, generator=generator)
    return noise


def sample_timesteps(batch_size: int, generator: torch.Generator) -> Tensor:
    """(B,) int64, uniform over all 1000."""
    return torch.randint(0, NUM_TIMESTEPS, (batch_size,), generator=generator)


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
