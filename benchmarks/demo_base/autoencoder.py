"""Trains the demo base's AutoencoderKL (factor 8, 4 channels) on every picture set, then encodes the base's pictures.

Resumable: `autoencoder.pt` holds the whole state. At the end the latents' mean and size are folded into quant_conv and
post_quant_conv, so that SDXL's factor 0.13025 gives latents of mean 0 and variance 1.
"""

import math
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from pictures import PACKAGES, load_base_set, load_set
from progress import Log, save_state
from torch import Tensor, nn
from torch.nn import functional as F

from crumb.engine.model.config import VAE_SCALING_FACTOR, make_vae_config

WIDTHS = (32, 32, 64, 96)
LEARNING_RATE = 1e-3
WARMUP_STEPS = 100
# Two cosines. After the first, shapes are right and hues are not: four channels carry light and one axis of colour at
# first. The second adds a squared loss on the colour of 8x8 areas (an absolute one is content with the commonest hue).
CYCLES = (2500, 2000)
COLOUR_WEIGHT = 20.0
KL_WEIGHT = 1e-4
EDGE_WEIGHT = 0.5
# Latents with the usual spread of 1 at the start drown what they say, and the decoder learns to answer plain white.
FIRST_LOG_VARIANCE = -6.0
# Crops of half the side cost the same for four times the pictures; the last part trains on whole ones.
WHOLE_FROM = 0.75  # of a cycle
CROP, CROP_BATCH, WHOLE_BATCH = 64, 16, 4


def new_autoencoder() -> AutoencoderKL:
    model = AutoencoderKL(**make_vae_config(WIDTHS, 1, 4, 128)).to(memory_format=torch.channels_last)
    nn.init.constant_(model.quant_conv.bias[4:], FIRST_LOG_VARIANCE)
    return model


def train_autoencoder(folder: Path, seed: int = 0, save_every: int = 250) -> None:
    """Trains through CYCLES, from the last kept state if there is one."""
    torch.manual_seed(seed)
    pictures = torch.from_numpy(np.concatenate([load_set(folder, name)[1] for name in PACKAGES])).permute(0, 3, 1, 2)
    model = new_autoencoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0)
    state_path, step = folder / "autoencoder.pt", 0
    num_steps = sum(CYCLES)
    if state_path.exists():
        state = torch.load(state_path)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    log = Log(folder / "autoencoder.jsonl", "l1", 50)
    while step < num_steps:
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step)
        loss, l1 = _loss(model, _batch(pictures, step, seed), COLOUR_WEIGHT if step >= CYCLES[0] else 0.0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        log.add(step, l1.item())
        if step % save_every == 0 or step == num_steps:
            save_state(state_path, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step})


def folded_autoencoder(folder: Path) -> AutoencoderKL:
    """The trained autoencoder, its latents of mean 0 and variance 1 over the base's pictures once scaled."""
    model = new_autoencoder()
    model.load_state_dict(torch.load(folder / "autoencoder.pt")["model"])
    means = _means(model, torch.from_numpy(load_base_set(folder)[1]).permute(0, 3, 1, 2))
    shift = means.mean(dim=(0, 2, 3))
    size = (means - shift.view(-1, 1, 1)).std() * VAE_SCALING_FACTOR
    with torch.no_grad():
        quant, post = model.quant_conv, model.post_quant_conv
        # New means: (old - shift) / size, and so the variance falls by size².
        quant.weight[:4] /= size
        quant.bias[:4] = (quant.bias[:4] - shift) / size
        quant.bias[4:] -= 2 * math.log(size)
        post.bias += (post.weight.flatten(1) @ shift).view_as(post.bias)
        post.weight *= size
    return model.eval()


def encode_base_pictures(folder: Path, model: AutoencoderKL) -> None:
    """Writes the scaled latents' means, (N, 4, 16, 16) fp32, to latents.npy."""
    pictures = torch.from_numpy(load_base_set(folder)[1]).permute(0, 3, 1, 2)
    np.save(folder / "latents.npy", (_means(model, pictures) * VAE_SCALING_FACTOR).numpy())


@torch.no_grad()
def _means(model: AutoencoderKL, pictures: Tensor) -> Tensor:
    chunks = [_to_range(part) for part in pictures.split(32)]
    return torch.cat([model.encode(chunk).latent_dist.mean for chunk in chunks])


def _to_range(pictures: Tensor) -> Tensor:
    return (pictures.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def _loss(model: AutoencoderKL, batch: Tensor, colour_weight: float) -> tuple[Tensor, Tensor]:
    posterior = model.encode(batch).latent_dist
    decoded = model.decode(posterior.sample()).sample.float()
    l1 = (decoded - batch).abs().mean()
    edges = sum((decoded.diff(dim=dim) - batch.diff(dim=dim)).abs().mean() for dim in (2, 3))
    kl = 0.5 * (posterior.mean.float().square() + posterior.var.float() - 1 - posterior.logvar.float()).mean()
    coarse = F.avg_pool2d(decoded - batch, 8)
    colour = (coarse - coarse.mean(dim=1, keepdim=True)).square().mean()
    return l1 + colour_weight * colour + 2 * (decoded - batch).square().mean() + EDGE_WEIGHT * edges + KL_WEIGHT * kl, l1


def _batch(pictures: Tensor, step: int, seed: int) -> Tensor:
    """Random pictures as (B, 3, H, W) in [-1, 1]: mirrored, with colours changed about so that no hue is rare."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    whole = _place_in_cycle(step) >= WHOLE_FROM
    num = WHOLE_BATCH if whole else CROP_BATCH
    batch = pictures[torch.randint(len(pictures), (num,), generator=generator)]
    if not whole:
        corners = torch.randint(8, pictures.shape[-1] - CROP - 7, (num, 2), generator=generator).tolist()
        batch = torch.stack([p[:, y : y + CROP, x : x + CROP] for p, (y, x) in zip(batch, corners)])
    mirrored = torch.rand(num, generator=generator) < 0.5
    batch = torch.where(mirrored.view(-1, 1, 1, 1), batch.flip(-1), batch)
    for i in (torch.rand(num, generator=generator) < 0.4).nonzero().flatten().tolist():
        batch[i] = batch[i][torch.randperm(3, generator=generator)]
    return _to_range(batch)


def _place_in_cycle(step: int) -> float:
    """From 0 at the cycle's start to 1 at its end."""
    return step / CYCLES[0] if step < CYCLES[0] else (step - CYCLES[0]) / CYCLES[1]


def _learning_rate(step: int) -> float:
    cosine = 0.5 * (1 + math.cos(math.pi * _place_in_cycle(step)))
    return LEARNING_RATE * min(1, (step + 1) / WARMUP_STEPS) * max(0.02, cosine)


if __name__ == "__main__":
    import sys

    train_autoencoder(Path(sys.argv[1]))
