"""A trainer on the tiny base with four made-up pictures, ready to step."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from crumb.engine.data.caches import write_entry
from crumb.engine.data.prepare import TrainingSet
from crumb.engine.memory.placement import Placement
from crumb.engine.model.load import load_unet
from crumb.engine.network.lora import attach_lora
from crumb.engine.train.loop import Trainer
from crumb.engine.train.noise import alphas_cumprod
from crumb.engine.train.optimizer import make_optimizer
from crumb.profiles.base_model import inspect_base_model
from crumb.profiles.buckets import assign
from crumb.profiles.epoch import Epoch
from crumb.profiles.pictures import Picture
from crumb.profiles.subsets import Subset

NUM_PICTURES = 4


@pytest.fixture
def trainer(tiny_base, tmp_path, make_plan):
    def make(dtype=torch.float32, **settings) -> Trainer:
        plan = make_plan(**{"rank": 4, "alpha": 4.0, "steps": 10, "learning_rate": 1e-3} | settings)
        placement = Placement(torch.device("cpu"), dtype, False)
        unet = load_unet(inspect_base_model(tiny_base), dtype)
        network = attach_lora(unet, plan)
        for index, layer in enumerate(network.layers.values()):  # B is zero at first, and then dA is too
            layer.lora_B.data = torch.randn(layer.lora_B.shape, generator=torch.Generator().manual_seed(index)) * 0.05
        optimizer = make_optimizer(plan, network.rate_groups(plan.lora_plus_ratio), placement.device, print)
        scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
        return Trainer(plan, unet, network, optimizer, scaler, training_set(tmp_path), placement, alphas_cumprod(False),
                       0.13025, SimpleNamespace(), SimpleNamespace())
    return make


def training_set(folder: Path) -> TrainingSet:
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
    return TrainingSet(pictures, [assign(128, 128, 128)] * NUM_PICTURES, list(prompts), latents, prompts,
                       Epoch({(128, 128): list(range(NUM_PICTURES))}), [], "base",
                       [Subset(images="p", repeats=1, trigger="", class_word="", flip=False, masked_loss="off")])
