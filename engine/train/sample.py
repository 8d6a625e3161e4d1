"""Sample pictures, made by the resident U-Net with cached prompt embeddings.

The two guidance passes run one after the other and the VAE comes only at the end, so that sampling
takes no more memory than a training step.
"""

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler
from PIL import Image
from torch import Tensor

from crumb.engine.faults import fault
from crumb.engine.memory.placement import Placement, free_memory
from crumb.engine.model.load import load_vae, tile_vae
from crumb.engine.train.noise import BETA_END, BETA_START, NUM_TIMESTEPS
from crumb.profiles.base_model import VAE_SCALE, BaseModel
from crumb.profiles.plan import Plan
from crumb.profiles.sample_prompts import SamplePrompt, sample_prompts

log = logging.getLogger("crumb")


def sample_pictures(unet, entries: dict[str, dict[str, Tensor]], plan: Plan, base: BaseModel, placement: Placement,
                    folder: Path, step: int) -> list[Path]:
    """One picture per sample prompt, always from the same noise, as folder/step-000500-0.png and so on.

    `entries` holds each text's conditioning.
    """
    fault(f"sample {step}")
    with torch.no_grad():
        latents = [denoise(unet, entries, prompt, plan, placement) for prompt in sample_prompts(plan)]
        vae = load_decoder(plan, base, placement)
        images = decode_all(vae, latents)
    del vae
    free_memory()
    paths = []
    for index, image in enumerate(images):
        path = folder / f"step-{step:06d}-{index}.png"
        aside = path.with_name(f".{path.name}")
        image.save(aside, format="PNG")
        paths.append(aside.replace(path))
    return paths


def denoise(unet, entries: dict[str, dict[str, Tensor]], prompt: SamplePrompt, plan: Plan, placement: Placement,
            on_step: Callable[[], None] = lambda: None) -> Tensor:
    """Latents (1, 4, H, W) fp32 by Euler steps with classifier-free guidance; 1 is none, and takes half the time.

    `entries` holds the conditioning of the prompt's text and of its negative.
    """
    scheduler = make_scheduler(plan)
    scheduler.set_timesteps(prompt.steps, device=placement.device)
    generator = torch.Generator().manual_seed(prompt.seed)
    latents = torch.randn((1, 4, prompt.height // VAE_SCALE, prompt.width // VAE_SCALE), generator=generator)
    latents = latents.to(placement.device) * scheduler.init_noise_sigma
    texts = (prompt.text,) if prompt.guidance == 1 else (prompt.text, prompt.negative)
    given = [entries[text] for text in texts]
    # A picture of this very size, not cropped: original size, crop, target size (Podell et al. 2023, section 2.2).
    sides = [float(prompt.height), float(prompt.width)]
    time_ids = torch.tensor([[*sides, 0.0, 0.0, *sides]], device=placement.device)
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(latents, timestep).to(placement.dtype)
        predicted, *unconditional = (
            unet(scaled, timestep, encoder_hidden_states=entry["encoder_hidden_states"][None].to(scaled),
                 added_cond_kwargs={"text_embeds": entry["pooled"][None].to(scaled), "time_ids": time_ids},
                 return_dict=False)[0].float()
            for entry in given
        )
        for without in unconditional:
            predicted = without + prompt.guidance * (predicted - without)
        latents = scheduler.step(predicted, timestep, latents).prev_sample
        on_step()
    return latents


def make_scheduler(plan: Plan) -> EulerDiscreteScheduler:
    """SDXL's sampler settings; a base with zero terminal SNR starts from pure noise."""
    return EulerDiscreteScheduler(
        num_train_timesteps=NUM_TIMESTEPS, beta_start=BETA_START, beta_end=BETA_END, beta_schedule="scaled_linear",
        prediction_type=plan.prediction_type, rescale_betas_zero_snr=plan.zero_terminal_snr,
        timestep_spacing="trailing" if plan.zero_terminal_snr else "leading", steps_offset=1,
    )


def load_decoder(plan: Plan, base: BaseModel, placement: Placement) -> AutoencoderKL:
    """The plan's VAE, in tiles where it says so; on the processor, in fp32, where the GPU has no room for it."""
    path = Path(plan.vae) if plan.vae else None
    try:
        vae = load_vae(base, path, placement.encoder_dtype, placement.device)
    except torch.OutOfMemoryError:
        vae = None
    if vae is None:
        free_memory()
        vae = load_vae(base, path, torch.float32, "cpu")
    if plan.vae_tiling:
        tile_vae(vae)
    return vae


def decode_all(vae: AutoencoderKL, latents: list[Tensor]) -> list[Image.Image]:
    """On the VAE's device; where that has no room left, on the processor, in fp32. `vae` may be moved."""
    try:
        fault("decode")
        return [decode(vae, one) for one in latents]
    except torch.OutOfMemoryError:
        log.warning("no room on the GPU to decode pictures: decoding them on the processor")
    vae.to("cpu", torch.float32)
    return [decode(vae, one) for one in latents]


def decode(vae: AutoencoderKL, latents: Tensor) -> Image.Image:
    pixels = vae.decode((latents / vae.config.scaling_factor).to(vae.device, vae.dtype)).sample[0].float().cpu()
    array = (pixels.nan_to_num() / 2 + 0.5).clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(array)
