"""A trainer on the tiny base with four made-up pictures, ready to step."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL

from crumb.engine.data.caches import write_entry
from crumb.engine.data.prepare import TrainingSet
from crumb.engine.memory.placement import Placement
from crumb.engine.model.load import load_text_encoders, load_unet, load_vae
from crumb.engine.network.lora import attach_lora
from crumb.engine.network.text import attach_text_lora
from crumb.engine.train.loop import Trainer
from crumb.engine.train.noise import alphas_cumprod
from crumb.engine.train.optimizer import make_optimizer
from crumb.profiles.base_model import inspect_base_model
from crumb.profiles.buckets import assign
from crumb.profiles.epoch import Epoch
from crumb.profiles.pictures import Picture
from crumb.profiles.plan import Plan
from crumb.profiles.subsets import effective_subsets

NUM_PICTURES = 4


@pytest.fixture
def trainer(tiny_base, tmp_path, make_plan):
    def make(dtype=torch.float32, **settings) -> Trainer:
        plan = make_plan(**{"rank": 4, "alpha": 4.0, "steps": 10, "learning_rate": 1e-3} | settings)
        placement = Placement(torch.device("cpu"), dtype)
        unet = load_unet(inspect_base_model(tiny_base), dtype)
        network, encoders = attach_lora(unet, plan), None
        if plan.text_encoders_learn:
            encoders = load_text_encoders(inspect_base_model(tiny_base), dtype)
            attach_text_lora(network, encoders, plan)
        for index, layer in enumerate(network.layers.values()):  # B is zero at first, and then dA is too
            layer.lora_B.data = torch.randn(layer.lora_B.shape, generator=torch.Generator().manual_seed(index)) * 0.05
        optimizer = make_optimizer(plan, network.rate_groups(plan.lora_plus_ratio))
        scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
        pictures = training_set(tmp_path, plan, encoded=encoders is None)
        return Trainer(plan, unet, network, optimizer, scaler, pictures, placement, alphas_cumprod(False), 0.13025,
                       SimpleNamespace(), SimpleNamespace(), encoders)
    return make


@pytest.fixture(scope="session")
def other_vae(tiny_base, tmp_path_factory) -> SimpleNamespace:
    """A VAE of the tiny base's shape and weights of its own: its `folder`, and as diffusers reads it `whole` and `tiled`."""
    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(7)
    AutoencoderKL(**load_vae(inspect_base_model(tiny_base), None, torch.float32).config).save_pretrained(folder)
    whole, tiled = AutoencoderKL.from_pretrained(folder), AutoencoderKL.from_pretrained(folder)
    tiled.enable_tiling()
    tiled.tile_sample_min_size, tiled.tile_latent_min_size = 512, 64
    return SimpleNamespace(folder=folder, whole=whole, tiled=tiled)


def training_set(folder: Path, plan: Plan, encoded: bool) -> TrainingSet:
    generator = torch.Generator().manual_seed(3)
    latents, prompts = [], {}
    for index in range(NUM_PICTURES):
        latents.append(folder / "cache" / "latents" / f"{index}.safetensors")
        write_entry(latents[-1], {"mean": torch.randn(4, 16, 16, generator=generator) * 7,
                                  "std": torch.full((4, 16, 16), 0.1)})
        prompts[f"caption {index}"] = folder / "cache" / "prompts" / f"{index}.safetensors"
        write_entry(prompts[f"caption {index}"], {"encoder_hidden_states": torch.randn(77, 128, generator=generator),
                                                  "pooled": torch.randn(64, generator=generator)})
    pictures = [Picture(Path(f"{index}.png"), 128, 128, 1, f"caption {index}", None) for index in range(NUM_PICTURES)]
    return TrainingSet(pictures, [assign(128, 128, 128)] * NUM_PICTURES, list(prompts), latents, prompts if encoded else {},
                       Epoch({(128, 128): list(range(NUM_PICTURES))}), [], "base",
                       effective_subsets(plan), num_variants=plan.num_caption_variants, seed=plan.seed)
