"""Sample pictures equal diffusers' own pipeline from the same noise, and every option of a prompt acts."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from crumb.engine.data.caches import cache_prompts
from crumb.engine.data.prepare import load_entry
from crumb.engine.memory.placement import Placement
from crumb.engine.model.load import load_text_encoders, load_unet
from crumb.engine.model.text import encode_prompts
from crumb.engine.model.tiny import write_diffusers_folder
from crumb.engine.train import sample
from crumb.engine.train.sample import make_scheduler, sample_pictures
from crumb.profiles.base_model import inspect_base_model
from crumb.profiles.sample_prompts import sample_prompts, texts_of

PLACEMENT = Placement(torch.device("cpu"), torch.float32)
ALL_OPTIONS = "a red cat --n blurry --d 5 --w 192 --h 64 --l 5 --s 3"


@pytest.fixture
def draw(tiny_base, tmp_path, make_plan):
    """Samples a plan's prompts on the tiny base; returns pixels per prompt. Its last U-Net is `draw.unet`."""
    base = inspect_base_model(tiny_base)

    def draw(*prompts: str, **settings) -> list[np.ndarray]:
        plan = make_plan(base_model=str(tiny_base), sample_prompts=list(prompts),
                         **{"sample_steps": 4, "sample_guidance": 3.0, "seed": 11} | settings)
        paths = cache_prompts(texts_of(sample_prompts(plan)), lambda device: load_text_encoders(base, torch.float32, device),
                              encode_prompts, "base", "float32", tmp_path / "cache", on_progress=lambda *_: None, device="cpu")
        draw.unet = load_unet(base, torch.float32)
        draw.num_passes = 0
        draw.unet.register_forward_hook(lambda *_: setattr(draw, "num_passes", draw.num_passes + 1))
        entries = {text: load_entry(path) for text, path in paths.items()}
        drawn = sample_pictures(draw.unet, entries, plan, base, PLACEMENT, tmp_path, 7)
        assert [path.name for path in drawn] == [f"step-000007-{index}.png" for index in range(len(prompts))]
        return [np.asarray(Image.open(path), int) for path in drawn]
    return draw


def test_equals_diffusers_pipeline(draw, tiny_base, tmp_path, make_plan):
    plain, with_options = draw("a red cat", ALL_OPTIONS)
    folder = tmp_path / "diffusers"
    write_diffusers_folder(folder, tiny_base, dtype=torch.float32)
    encoders = load_text_encoders(inspect_base_model(tiny_base), torch.float32)
    pipeline = StableDiffusionXLPipeline(
        AutoencoderKL.from_pretrained(folder / "vae"), CLIPTextModel.from_pretrained(folder / "text_encoder"),
        CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2"), encoders.tokenizer, encoders.tokenizer_2,
        UNet2DConditionModel.from_pretrained(folder / "unet"), make_scheduler(make_plan()), force_zeros_for_empty_prompt=False)
    pipeline.set_progress_bar_config(disable=True)

    def expected(negative, seed, **settings):
        return np.asarray(pipeline("a red cat", negative_prompt=negative, generator=torch.Generator().manual_seed(seed),
                                   **settings).images[0], int)
    for ours, theirs in (
            (plain, expected("", 11, num_inference_steps=4, guidance_scale=3.0, width=128, height=128)),
            (with_options, expected("blurry", 5, num_inference_steps=3, guidance_scale=5.0, width=192, height=64))):
        assert ours.shape == theirs.shape
        difference = np.abs(ours - theirs)
        assert difference.max() <= 1, f"largest difference {difference.max()} of 255, mean {difference.mean():.3f}"


@pytest.mark.parametrize("option", [" --n blurry", " --d 5", " --w 192", " --h 64", " --l 5", " --s 3"])
def test_a_prompt_without_one_of_its_options_gives_another_picture(draw, option):
    """So that the comparison with diffusers fails when one is ignored."""
    with_it, without = draw(ALL_OPTIONS, ALL_OPTIONS.replace(option, ""))
    assert with_it.shape != without.shape or np.abs(with_it - without).max() > 1


def test_the_plans_negative_is_the_default(draw):
    by_plan, by_option, without = draw("a red cat --d 5", "a red cat --d 5 --n blurry", "a red cat --d 5 --n",
                                       sample_negative="blurry")
    assert np.array_equal(by_plan, by_option) and not np.array_equal(by_plan, without)


def test_guidance_1_takes_one_pass_a_step(draw):
    near, = draw("a red cat --l 1.0001")
    assert draw.num_passes == 8
    alone, = draw("a red cat --l 1")
    assert draw.num_passes == 4
    assert np.abs(near - alone).max() <= 1


def test_scheduler_follows_the_base(make_plan):
    velocity = make_scheduler(replace(make_plan(), prediction_type="v_prediction", zero_terminal_snr=True))
    assert velocity.config.prediction_type == "v_prediction" and velocity.config.timestep_spacing == "trailing"
    assert make_scheduler(make_plan()).config.prediction_type == "epsilon"


@pytest.mark.parametrize("vae_tiling", [False, True])
def test_the_plans_vae_decodes_and_in_tiles_where_it_says_so(draw, other_vae, monkeypatch, vae_tiling):
    """Against diffusers' VAE of that folder; the picture is larger than a tile, and tiles give something else."""
    real, seen = sample.decode_all, []
    monkeypatch.setattr(sample, "decode_all", lambda vae, latents: seen.extend(latents) or real(vae, latents))
    drawn, = draw("a red cat --w 576 --h 64 --l 1 --s 1", vae=str(other_vae.folder), vae_tiling=vae_tiling)
    differences = []
    for vae in (other_vae.whole, other_vae.tiled):
        with torch.no_grad():
            pixels = vae.decode(seen[0] / 0.13025).sample[0].permute(1, 2, 0).numpy()
        differences.append(np.abs(drawn - ((pixels / 2 + 0.5).clip(0, 1) * 255).round()).max())
    assert differences[vae_tiling] <= 1, f"largest difference {differences[vae_tiling]} of 255"
    assert differences[not vae_tiling] > 1, "whole and in tiles is all the same here, so nothing was compared"


def test_pictures_are_decoded_on_the_processor_where_the_gpu_has_no_room(draw, monkeypatch):
    expected = draw("a red cat")
    real, calls = sample.decode, []

    def full_at_first(vae, latents):
        calls.append(vae.device)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(vae, latents)
    monkeypatch.setattr(sample, "decode", full_at_first)
    assert np.array_equal(draw("a red cat"), expected) and len(calls) == 2 and calls[1].type == "cpu"
