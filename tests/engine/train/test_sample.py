"""Sample pictures equal diffusers' own pipeline from the same noise."""

from dataclasses import replace

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from crumb.engine.data.caches import write_entry
from crumb.engine.data.prepare import TrainingSet
from crumb.engine.memory.placement import Placement
from crumb.engine.model.load import load_text_encoders, load_unet
from crumb.engine.model.text import encode_prompts
from crumb.engine.model.tiny import write_diffusers_folder
from crumb.engine.train.sample import contact_sheet, make_scheduler, sample_pictures
from crumb.profiles.base_model import inspect_base_model
from crumb.profiles.plan import Plan


def test_equals_diffusers_pipeline(tiny_base, tmp_path):
    base = inspect_base_model(tiny_base)
    plan = Plan(name="t", created="2026-01-01T00:00:00+00:00", base_model=str(tiny_base), images="p", resolution=128,
                sample_prompts=["a red cat"], sample_steps=4, sample_guidance=3.0, seed=11)
    placement = Placement(torch.device("cpu"), torch.float32, False)
    encoders = load_text_encoders(base, torch.float32)
    paths = {}
    for index, prompt in enumerate(["", "a red cat"]):
        with torch.no_grad():
            hidden, pooled = encode_prompts(encoders, [prompt])
        paths[prompt] = tmp_path / "cache" / "p" / f"{index}.safetensors"
        write_entry(paths[prompt], {"encoder_hidden_states": hidden[0], "pooled": pooled[0]})
    training_set = TrainingSet([], [], [], [], paths, {}, [], "base")
    [path] = sample_pictures(load_unet(base, torch.float32), training_set, plan, base, placement, tmp_path, 7)
    assert path.name == "step-000007-0.png"

    folder = tmp_path / "diffusers"
    write_diffusers_folder(folder, tiny_base, dtype=torch.float32)
    pipeline = StableDiffusionXLPipeline(
        AutoencoderKL.from_pretrained(folder / "vae"), CLIPTextModel.from_pretrained(folder / "text_encoder"),
        CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2"), encoders.tokenizer, encoders.tokenizer_2,
        UNet2DConditionModel.from_pretrained(folder / "unet"), make_scheduler(plan), force_zeros_for_empty_prompt=False)
    pipeline.set_progress_bar_config(disable=True)
    [expected] = pipeline("a red cat", negative_prompt="", num_inference_steps=4, guidance_scale=3.0, width=128, height=128,
                          generator=torch.Generator().manual_seed(11)).images
    difference = np.abs(np.asarray(Image.open(path), int) - np.asarray(expected, int))
    assert difference.max() <= 1, f"largest difference {difference.max()} of 255, mean {difference.mean():.3f}"

    velocity = make_scheduler(replace(plan, prediction_type="v_prediction", zero_terminal_snr=True))
    assert velocity.config.prediction_type == "v_prediction" and velocity.config.timestep_spacing == "trailing"
    assert make_scheduler(plan).config.prediction_type == "epsilon"

    contact_sheet([[path, path], [path, path]], tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").size == (256, 256)
