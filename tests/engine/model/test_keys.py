"""The name maps over the true SDXL, held against diffusers' own modules and converters."""

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

from crumb.engine.model import keys
from crumb.engine.model.config import (
    make_text_encoder_config,
    make_unet_config,
    text_encoder_config,
    unet_config,
    vae_config,
)

SDXL_UNET = {
    "sample_size": 128, "in_channels": 4, "out_channels": 4, "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048,
    "use_linear_projection": True, "norm_num_groups": 32, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
SDXL_VAE = {
    "in_channels": 3, "out_channels": 3, "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4, "latent_channels": 4,
    "norm_num_groups": 32, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True,
}  # fmt: skip
CLIP_L = (768, 3072, 12, 768, "quick_gelu")
BIG_G = (1280, 5120, 32, 1280, "gelu")


@pytest.fixture(scope="module")
def unet():
    with torch.device("meta"):
        return UNet2DConditionModel(**SDXL_UNET)


@pytest.fixture(scope="module")
def vae():
    with torch.device("meta"):
        return AutoencoderKL(**SDXL_VAE)


def test_unet_names_agree_with_diffusers_and_are_a_bijection(unet):
    names = list(unet.state_dict())
    stored = {keys.UNET_PREFIX + keys.unet_to_ldm(name): torch.empty(0) for name in names}
    assert len(names) == len(stored) == 1680
    assert {keys.unet_from_ldm(keys.unet_to_ldm(name)) for name in names} == set(names)
    assert [keys.unet_from_ldm(keys.unet_to_ldm(name)) for name in names] == names
    # diffusers turns our names into its own, tensor by tensor
    stored = {key: torch.tensor([i]) for i, key in enumerate(stored)}
    converted = convert_ldm_unet_checkpoint(dict(stored), SDXL_UNET | {"class_embed_type": None})
    assert {name: int(tensor) for name, tensor in converted.items()} == {name: i for i, name in enumerate(names)}


def test_unet_modules_and_lora_stems(unet):
    modules = [name for name, module in unet.named_modules() if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)]
    stems = {keys.lora_stem(name) for name in modules}
    assert len(stems) == len(modules)
    attention = [stem for stem in stems if "_transformer_blocks_" in stem or stem.endswith(("_proj_in", "_proj_out"))]
    assert len(attention) == 722
    assert keys.lora_stem("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q") == (
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    )
    assert keys.lora_stem("up_blocks.1.upsamplers.0.conv") == "lora_unet_output_blocks_5_2_conv"
    assert keys.lora_stem("down_blocks.0.downsamplers.0.conv") == "lora_unet_input_blocks_3_0_op"
    assert keys.lora_stem("down_blocks.1.resnets.0.conv_shortcut") == "lora_unet_input_blocks_4_0_skip_connection"
    for foreign in ("encoder.conv_in", "middle_block.3.x", "input_blocks.3.1.proj_in", "nonsense"):
        with pytest.raises(ValueError):
            keys.unet_from_ldm(foreign)


def test_vae_names_agree_with_diffusers(vae):
    names = list(vae.state_dict())
    assert len(names) == 248 and [keys.vae_from_ldm(keys.vae_to_ldm(name)) for name in names] == names
    stored = {keys.VAE_PREFIX + keys.vae_to_ldm(name): torch.tensor([i]) for i, name in enumerate(names)}
    converted = convert_ldm_vae_checkpoint(stored, SDXL_VAE)
    assert {name: int(tensor) for name, tensor in converted.items()} == {name: i for i, name in enumerate(names)}
    assert (
        keys.vae_modern_name("encoder.mid_block.attentions.0.proj_attn.bias")
        == "encoder.mid_block.attentions.0.to_out.0.bias"
    )


def test_text_names():
    names = text_shapes(*BIG_G, projection=True)
    stored = {keys.open_clip_source(name).key for name in names}
    assert len(stored) == 389 and "transformer.resblocks.31.attn.in_proj_bias" in stored
    assert {name for key in stored for name in keys.open_clip_names(key)} == set(names)
    assert keys.open_clip_source("text_model.encoder.layers.3.self_attn.v_proj.weight") == keys.Source(
        "transformer.resblocks.3.attn.in_proj_weight", third=2
    )
    assert keys.open_clip_source("text_projection.weight") == keys.Source("text_projection", transposed=True)
    assert keys.text_name("encoder.layers.0.mlp.fc1") == "text_model.encoder.layers.0.mlp.fc1"


def text_shapes(hidden_size, intermediate_size, num_layers, projection_dim, hidden_act, projection):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = make_text_encoder_config(hidden_size, intermediate_size, num_layers, projection_dim, hidden_act)
    with torch.device("meta"):
        model = (CLIPTextModelWithProjection if projection else CLIPTextModel)(CLIPTextConfig(**config))
    return {keys.text_name(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def test_configs_inferred_from_shapes_are_the_published_ones(unet, vae):
    shapes = {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
    assert unet_config(shapes, pooled_dim=1280) == SDXL_UNET
    assert sum(tensor.numel() for tensor in unet.state_dict().values()) == 2_567_463_684
    assert vae_config({name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()}) == SDXL_VAE
    for sizes, projection, num_heads, num_tensors in ((CLIP_L, False, 12, 196), (BIG_G, True, 20, 517)):
        shapes = text_shapes(*sizes, projection)
        config = text_encoder_config(shapes, sizes[-1])
        assert len(shapes) == num_tensors and config["num_attention_heads"] == num_heads
        assert tuple(config[name] for name in (
            "hidden_size", "intermediate_size", "num_hidden_layers", "projection_dim", "hidden_act"
        )) == sizes  # fmt: skip
        assert (config["vocab_size"], config["max_position_embeddings"]) == (49408, 77)


def test_depth_zero_and_one_head_survive_inference():
    config = make_unet_config((32, 64, 128), (0, 1, 2), 128, pooled_dim=64, added_dim=64 + 6 * 256, sample_size=16)
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in UNet2DConditionModel(**config).state_dict().items()}
    assert unet_config(shapes, pooled_dim=64, sample_size=16) == config
