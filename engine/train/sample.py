"""Sample pictures, made by the resident U-Net with cached prompt embeddings.

The two guidance passes run one after the other and the VAE comes only at the end, so that sampling
takes no more memory than a training step.
"""

import gc
from pathlib import Path

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler
from PIL import Image
from torch import Tensor

from crumb.engine.data.prepare import TrainingSet, load_entry
from crumb.engine.memory.placement import Placement
from crumb.engine.model.load import load_vae, tile_vae
from crumb.engine.train.noise import BETA_END, BETA_START, NUM_TIMESTEPS
from crumb.profiles.base_model import BaseModel
from crumb.profiles.plan import Plan

NEGATIVE_PROMPT = ""


def sample_pictures(unet, training_set: TrainingSet, plan: Plan, base: BaseModel, placement: Placement,
                    folder: Path, step: int) -> list[Path]:
    """One picture per sample prompt, always from the same noise, as folder/step-000500-0.png and so on."""
    embeddings = [load_entry(training_set.prompt_paths[prompt]) for prompt in (NEGATIVE_PROMPT, *plan.sample_prompts)]
    with torch.no_grad():
        latents = [denoise(unet, embeddings[0], embedding, plan, placement, plan.seed + index)
                   for index, embedding in enumerate(embeddings[1:])]
        vae = load_vae(base, Path(plan.vae) if plan.vae else None, placement.encoder_dtype, placement.device)
        if plan.vae_tiling:
            tile_vae(vae)
        images = [decode(vae, one) for one in latents]
    del vae
    gc.collect()
    paths = []
    for index, image in enumerate(images):
        path = folder / f"step-{step:06d}-{index}.png"
        aside = path.with_name(f".{path.name}")
        image.save(aside, format="PNG")
        paths.append(aside.replace(path))
    return paths


def denoise(unet, negative: dict[str, Tensor], positive: dict[str, Tensor], plan: Plan, placement: Placement,
            seed: int) -> Tensor:
    """Latents (1, 4, H, W) fp32 by Euler steps with classifier-free guidance."""
    scheduler = make_scheduler(plan)
    scheduler.set_timesteps(plan.sample_steps, device=placement.device)
    size = plan.resolution // 8
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn((1, 4, size, size), generator=generator).to(placement.device) * scheduler.init_noise_sigma
    side = float(plan.resolution)
    time_ids = torch.tensor([[side, side, 0.0, 0.0, side, side]], device=placement.device)
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(latents, timestep).to(placement.dtype)
        unconditional, conditional = (
            unet(scaled, timestep, encoder_hidden_states=entry["encoder_hidden_states"][None].to(scaled),
                 added_cond_kwargs={"text_embeds": entry["pooled"][None].to(scaled), "time_ids": time_ids},
                 return_dict=False)[0].float()
            for entry in (negative, positive)
        )
        guided = unconditional + plan.sample_guidance * (conditional - unconditional)
        latents = scheduler.step(guided, timestep, latents).prev_sample
    return latents


def make_scheduler(plan: Plan) -> EulerDiscreteScheduler:
    """SDXL's sampler settings; a base with zero terminal SNR starts from pure noise."""
    return EulerDiscreteScheduler(
        num_train_timesteps=NUM_TIMESTEPS, beta_start=BETA_START, beta_end=BETA_END, beta_schedule="scaled_linear",
        prediction_type=plan.prediction_type, rescale_betas_zero_snr=plan.zero_terminal_snr,
        timestep_spacing="trailing" if plan.zero_terminal_snr else "leading", steps_offset=1,
    )


def decode(vae: AutoencoderKL, latents: Tensor) -> Image.Image:
    pixels = vae.decode((latents / vae.config.scaling_factor).to(vae.dtype)).sample[0].float().cpu()
    array = (pixels.nan_to_num() / 2 + 0.5).clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(array)


def contact_sheet(rows: list[list[Path]], path: Path) -> None:
    """The given pictures in one PNG, a prompt per row, oldest left."""
    pictures = [[Image.open(file).convert("RGB") for file in row] for row in rows]
    width, height = pictures[0][0].size
    sheet = Image.new("RGB", (max(map(len, pictures)) * width, len(pictures) * height), "white")
    for y, row in enumerate(pictures):
        for x, picture in enumerate(row):
            sheet.paste(picture, (x * width, y * height))
    sheet.save(path)
