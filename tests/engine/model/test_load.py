"""Loading held against diffusers' and transformers' own loaders on a tiny SDXL."""

import json
import subprocess
import sys

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from crumb.engine.model.load import load_text_encoders, load_unet, load_vae
from crumb.engine.model.text import encode_prompts
from crumb.engine.model.tiny import write_diffusers_folder, write_sdxl
from crumb.profiles.base_model import inspect_base_model
from crumb.profiles.errors import RequestError

OPEN_CLIP = "conditioner.embedders.1.model."


@pytest.fixture(scope="module")
def single_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "tiny.safetensors"
    write_sdxl(path)
    return path


@pytest.fixture(scope="module")
def base(single_file):
    return inspect_base_model(single_file)


def assert_same_weights(ours, reference):
    expected = reference.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    different = {name: (tensor - expected[name]).abs().max().item() for name, tensor in ours.state_dict().items()}
    assert not {name: gap for name, gap in different.items() if gap}, different


def unet_output(unet):
    generator = torch.Generator().manual_seed(3)
    size = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    added = {
        "text_embeds": torch.randn(2, size, generator=generator),
        "time_ids": torch.tensor([[128.0, 96, 0, 16, 128, 96]]).repeat(2, 1),
    }
    latents = torch.randn(2, 4, 16, 12, generator=generator)
    states = torch.randn(2, 77, unet.config.cross_attention_dim, generator=generator)
    with torch.no_grad():
        return unet(latents, torch.tensor([10, 900]), states, added_cond_kwargs=added).sample


def test_unet_is_what_diffusers_loads(base):
    unet = load_unet(base, torch.float32)
    # The config written out, so that a wrong inference cannot hide in both.
    config = {
        "sample_size": 16, "block_out_channels": [32, 64, 128], "layers_per_block": 2, "cross_attention_dim": 128,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "attention_head_dim": [1, 1, 2],
        "transformer_layers_per_block": [1, 1, 2], "use_linear_projection": True, "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 64 + 6 * 256, "class_embed_type": None,
    }  # fmt: skip
    reference = UNet2DConditionModel.from_config(config)
    reference.load_state_dict(convert_ldm_unet_checkpoint(load_file(base.path), config))
    assert_same_weights(unet, reference)
    assert not unet.training and not any(parameter.requires_grad for parameter in unet.parameters())
    assert sum(parameter.numel() for parameter in unet.parameters()) == base.num_unet_parameters
    output = unet_output(unet)
    assert torch.equal(output, unet_output(reference.eval().to(memory_format=torch.channels_last)))
    assert 0.7 < output.std() < 1.4


def test_vae_and_text_encoders_are_what_diffusers_loads(base):
    stored = load_file(base.path)
    config = {
        "block_out_channels": [32, 32, 64, 64], "down_block_types": ["DownEncoderBlock2D"] * 4, "latent_channels": 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4, "layers_per_block": 1,
    }  # fmt: skip
    reference = AutoencoderKL.from_config(config)
    reference.load_state_dict(convert_ldm_vae_checkpoint(stored, config))
    vae = load_vae(base, None, torch.float32)
    assert_same_weights(vae, reference)
    assert vae.config.scaling_factor == 0.13025

    encoders = load_text_encoders(base, torch.float32)
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 1}
    clip_l = CLIPTextModel(CLIPTextConfig(**sizes, hidden_act="quick_gelu"))
    converted = convert_ldm_clip_checkpoint(stored)
    clip_l.load_state_dict({name.removeprefix("text_model."): tensor for name, tensor in converted.items()})
    assert_same_weights(encoders.text_encoder, clip_l)
    open_clip = CLIPTextModelWithProjection(CLIPTextConfig(**sizes, hidden_act="gelu", projection_dim=64))
    open_clip.load_state_dict(convert_open_clip_checkpoint(open_clip, stored, OPEN_CLIP))
    assert_same_weights(encoders.text_encoder_2, open_clip)


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)]
)
def test_storage_and_compute_dtypes(name, dtype, single_file, tmp_path):
    write_sdxl(tmp_path / "model.safetensors", dtype=name, vae=False, v_pred=True, ztsnr=True)
    base = inspect_base_model(tmp_path / "model.safetensors")
    assert (base.dtype, base.has_vae, base.prediction_type, base.zero_terminal_snr) == (
        name,
        False,
        "v_prediction",
        True,
    )
    unet = load_unet(base, dtype)
    assert {parameter.dtype for parameter in unet.parameters()} == {dtype}
    reference = load_unet(inspect_base_model(single_file), torch.float32).state_dict()
    gap = max((tensor.float() - reference[key]).abs().max().item() for key, tensor in unet.state_dict().items())
    assert gap <= (0.02 if name == "bf16" else 0.002), gap
    # The weights are copies: the file can go while they are in use.
    before = unet.conv_in.weight.clone()
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert torch.equal(before, unet.conv_in.weight)


def test_diffusers_folder_equals_single_file(base, tmp_path):
    write_diffusers_folder(tmp_path / "folder", base.path, torch.float32)
    folder = inspect_base_model(tmp_path / "folder")
    assert (folder.layout, folder.native_resolution, folder.prediction_type) == ("diffusers", 128, "epsilon")
    assert folder.num_unet_parameters == base.num_unet_parameters
    assert_same_weights(load_unet(folder, torch.float32), load_unet(base, torch.float32))
    assert_same_weights(load_vae(folder, None, torch.float32), load_vae(base, None, torch.float32))
    prompts = ["a photo of a cat", ""]
    for ours, expected in zip(
        encode_prompts(load_text_encoders(folder, torch.float32), prompts),
        encode_prompts(load_text_encoders(base, torch.float32), prompts),
        strict=True,
    ):
        assert torch.equal(ours, expected)


def test_separate_vae_in_every_form(base, tmp_path):
    expected = load_vae(base, None, torch.float32)
    stored = load_file(base.path)
    bare = {key.removeprefix("first_stage_model."): tensor for key, tensor in stored.items() if key.startswith("first")}
    save_file(bare | {"loss.logvar": torch.zeros(1)}, tmp_path / "ldm.safetensors")
    save_file(expected.state_dict(), tmp_path / "diffusers.safetensors")
    expected.save_pretrained(tmp_path / "vae")
    write_sdxl(tmp_path / "no_vae.safetensors", vae=False)
    without = inspect_base_model(tmp_path / "no_vae.safetensors")
    for form in ("ldm.safetensors", "diffusers.safetensors", "vae", "."):
        assert_same_weights(load_vae(without, tmp_path / form, torch.float32), expected)

    config = json.loads((tmp_path / "vae/config.json").read_text())
    (tmp_path / "vae/config.json").write_text(json.dumps(config | {"scaling_factor": 0.18215}))
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    for vae_path, message in (
        (None, "has no VAE inside"),
        (tmp_path / "absent", "no VAE at"),
        (tmp_path / "vae", "scaling_factor 0.18215"),
        (tmp_path / "other.safetensors", "lacks the tensor"),
    ):
        with pytest.raises(RequestError, match=message):
            load_vae(without, vae_path, torch.float32)


def test_damaged_models_name_the_tensors(base, tmp_path):
    stored = load_file(base.path)
    missing = "model.diffusion_model.middle_block.1.norm.weight"
    damages = {
        "lacks 1 tensors .mid_block.attentions.0.norm.weight": {k: v for k, v in stored.items() if k != missing},
        "has unknown 7 tensors .*, [.]{3}": stored
        | {f"model.diffusion_model.extra.{i}": torch.zeros(1) for i in range(7)},
        "middle_block.1.norm.weight has shape .5. where .128. is needed": stored | {missing: torch.zeros(5)},
    }
    for number, (message, tensors) in enumerate(damages.items()):
        save_file(tensors, tmp_path / f"{number}.safetensors")
        with pytest.raises(RequestError, match=message):
            load_unet(inspect_base_model(tmp_path / f"{number}.safetensors"), torch.float32)


def test_leftovers_of_other_programs_are_passed_over(base, tmp_path):
    position_ids = {"conditioner.embedders.0.transformer.text_model.embeddings.position_ids": torch.arange(77)[None]}
    others = {"model_ema.decay": torch.zeros(1), "denoiser.sigmas": torch.zeros(1000)}
    save_file(load_file(base.path) | position_ids | others, tmp_path / "m.safetensors")
    encoders = load_text_encoders(inspect_base_model(tmp_path / "m.safetensors"), torch.float32)
    assert encoders.text_encoder.embeddings.position_ids.tolist() == [list(range(77))]


MEASURE = """
import re, sys, threading, time, torch
from pathlib import Path
from crumb.engine.model.load import load_unet
from crumb.engine.model.tiny import SDXL, write_sdxl
from crumb.engine.model.weights import trim_memory
from crumb.profiles.base_model import inspect_base_model

def anonymous_bytes():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

peak, stop = [0], threading.Event()
def watch():
    while not stop.wait(0.02):
        peak[0] = max(peak[0], anonymous_bytes())

path = Path(sys.argv[1])
threading.Thread(target=watch, daemon=True).start()
write_sdxl(path, SDXL)
write_peak, peak[0] = peak[0], 0
unet = load_unet(inspect_base_model(path), torch.float16)
load_peak, num_parameters = peak[0], sum(parameter.numel() for parameter in unet.parameters())
del unet
trim_memory()
before, peak[0] = anonymous_bytes(), 0
unet = load_unet(inspect_base_model(path), torch.float16, "cpu", "nf4")
stop.set()
num_bytes = sum(weight.nbytes for weight in unet.parameters())
num_bytes += sum(module.weight.num_bytes for module in unet.modules() if hasattr(vars(module).get("weight"), "num_bytes"))
print(write_peak, load_peak, num_parameters, peak[0] - before, num_bytes)
"""


@pytest.mark.slow
def test_full_size_file_loads_in_little_more_than_its_own_memory(tmp_path):
    path = tmp_path / "sdxl.safetensors"
    try:
        done = subprocess.run([sys.executable, "-P", "-c", MEASURE, path], capture_output=True, text=True, check=True)
    finally:
        path.unlink(missing_ok=True)
    write_peak, load_peak, num_parameters, nf4_peak, nf4_bytes = map(int, done.stdout.split())
    assert num_parameters == 2_567_463_684
    assert write_peak < 1.5e9, write_peak
    assert load_peak < 2 * num_parameters + 1.5e9, load_peak
    assert nf4_peak < nf4_bytes + 2**28, (nf4_peak, nf4_bytes)
