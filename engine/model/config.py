"""Configs of an SDXL-structured model, from the shapes of its tensors.

Separate from loading so that any size of SDXL, the full one or a tiny one, goes through the same code, with no
table of known models. Shapes are keyed by diffusers and transformers names (`text_model.` in front, see keys.py).
"""

import re
from collections.abc import Iterable, Mapping, Sequence

# Stable Diffusion's noise schedule (Stability-AI/generative-models: sd_xl_base.yaml, LegacyDDPMDiscretization).
NOISE_SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}
VAE_SCALING_FACTOR = 0.13025
ATTENTION_HEAD_CHANNELS = 64
NUM_NORM_GROUPS = 32
# orig_h, orig_w, crop_top, crop_left, target_h, target_w
NUM_TIME_IDS = 6
BOS_TOKEN_ID, EOS_TOKEN_ID = 49406, 49407

Shapes = Mapping[str, Sequence[int]]


def unet_config(shapes: Shapes, pooled_dim: int, sample_size: int = 128) -> dict:
    """Arguments of UNet2DConditionModel; `pooled_dim` is text encoder 2's projection, `sample_size` latent pixels."""
    num_levels = _count(shapes, r"down_blocks\.(\d+)\.")
    depths = [
        _count(shapes, rf"down_blocks\.{i}\.attentions\.0\.transformer_blocks\.(\d+)\.") for i in range(num_levels)
    ]
    attention = next(name for name in shapes if name.endswith("attn2.to_k.weight"))
    return make_unet_config(
        block_out_channels=[shapes[f"down_blocks.{i}.resnets.0.conv1.weight"][0] for i in range(num_levels)],
        depths=depths,
        cross_attention_dim=shapes[attention][1],
        pooled_dim=pooled_dim,
        added_dim=shapes["add_embedding.linear_1.weight"][1],
        sample_size=sample_size,
    )


def make_unet_config(
    block_out_channels: Sequence[int],
    depths: Sequence[int],
    cross_attention_dim: int,
    pooled_dim: int,
    added_dim: int,
    sample_size: int,
) -> dict:
    """`depths` is the number of transformer blocks by level, 0 for none; `added_dim` = pooled + 6 time embeddings."""
    return {
        "sample_size": sample_size,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": tuple(block_out_channels),
        "down_block_types": tuple("CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths),
        "up_block_types": tuple("CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)),
        "layers_per_block": 2,
        "transformer_layers_per_block": tuple(max(depth, 1) for depth in depths),
        # Despite its name diffusers takes the number of heads here.
        "attention_head_dim": tuple(max(width // ATTENTION_HEAD_CHANNELS, 1) for width in block_out_channels),
        "cross_attention_dim": cross_attention_dim,
        "use_linear_projection": True,
        "norm_num_groups": NUM_NORM_GROUPS,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": (added_dim - pooled_dim) // NUM_TIME_IDS,
        "projection_class_embeddings_input_dim": added_dim,
    }


def vae_config(shapes: Shapes, sample_size: int = 1024) -> dict:
    """Arguments of AutoencoderKL; `sample_size` in pixels."""
    num_levels = _count(shapes, r"encoder\.down_blocks\.(\d+)\.")
    return make_vae_config(
        block_out_channels=[shapes[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"][0] for i in range(num_levels)],
        layers_per_block=_count(shapes, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        latent_channels=shapes["encoder.conv_out.weight"][0] // 2,
        sample_size=sample_size,
    )


def make_vae_config(
    block_out_channels: Sequence[int], layers_per_block: int, latent_channels: int, sample_size: int
) -> dict:
    return {
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": tuple(block_out_channels),
        "down_block_types": ("DownEncoderBlock2D",) * len(block_out_channels),
        "up_block_types": ("UpDecoderBlock2D",) * len(block_out_channels),
        "layers_per_block": layers_per_block,
        "latent_channels": latent_channels,
        "norm_num_groups": NUM_NORM_GROUPS,
        "sample_size": sample_size,
        "scaling_factor": VAE_SCALING_FACTOR,
        "force_upcast": True,
    }


def text_encoder_config(shapes: Shapes, hidden_act: str) -> dict:
    """Arguments of CLIPTextConfig. `hidden_act` is quick_gelu for CLIP-L and gelu for bigG: no shape tells it."""
    vocab_size, hidden_size = shapes["text_model.embeddings.token_embedding.weight"]
    return make_text_encoder_config(
        hidden_size=hidden_size,
        intermediate_size=shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
        num_layers=_count(shapes, r"text_model\.encoder\.layers\.(\d+)\."),
        projection_dim=shapes.get("text_projection.weight", (hidden_size,))[0],
        hidden_act=hidden_act,
        vocab_size=vocab_size,
        num_positions=shapes["text_model.embeddings.position_embedding.weight"][0],
    )


def make_text_encoder_config(
    hidden_size: int,
    intermediate_size: int,
    num_layers: int,
    projection_dim: int,
    hidden_act: str,
    vocab_size: int = 49408,
    num_positions: int = 77,
) -> dict:
    return {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": max(hidden_size // ATTENTION_HEAD_CHANNELS, 1),
        "projection_dim": projection_dim,
        "hidden_act": hidden_act,
        "vocab_size": vocab_size,
        "max_position_embeddings": num_positions,
        # Published configs say 2, which makes transformers pool at the highest token id: wrong once tokens are added.
        "eos_token_id": EOS_TOKEN_ID,
        "bos_token_id": BOS_TOKEN_ID,
        "pad_token_id": EOS_TOKEN_ID,
    }


def _count(names: Iterable[str], pattern: str) -> int:
    """How many numbers, from 0 up, the pattern's group takes at the start of the names."""
    return 1 + max((int(match[1]) for name in names if (match := re.match(pattern, name))), default=-1)
