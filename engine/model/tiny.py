"""Writes SDXL checkpoints of any size with random weights: what tests, the demo and the benchmarks load.

The file is a true SDXL single file: four parts under their LDM names, fp16, the metadata of a real one. Tensors are
made and written one at a time, so that the full-size file of 6.9 GB takes the memory of its largest tensor.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from crumb.engine.model import keys
from crumb.engine.model.config import (
    NUM_TIME_IDS,
    VAE_SCALING_FACTOR,
    make_text_encoder_config,
    make_unet_config,
    make_vae_config,
)
from crumb.engine.model.load import LATENT_CHANNELS, load_text_encoders, load_unet, load_vae
from crumb.profiles.base_model import VAE_SCALE, inspect_base_model

DTYPES = {"fp32": (torch.float32, "F32", 4), "fp16": (torch.float16, "F16", 2), "bf16": (torch.bfloat16, "BF16", 2)}
LOGIT_SCALE = 4.6055
# Keeps the sum of a residual stream and a branch near the stream's own size.
BRANCH_GAIN = 0.5
BRANCH_ENDS = tuple(
    f"{layer}.weight"
    for layer in (
        "out_layers.3", "to_out.0", "ff.net.2", "proj_out", "conv2", "attn.out_proj", "c_proj", "fc2",
    )
)  # fmt: skip
LOG_VARIANCE = -10.0
# The mean square of silu(x) for a standard normal x.
SILU_POWER = 0.356


@dataclass(frozen=True)
class Shape:
    """The sizes of an SDXL-structured model."""

    block_out_channels: tuple[int, ...]
    transformer_depths: tuple[int, ...]
    addition_time_embed_dim: int
    text_hidden_sizes: tuple[int, int]
    text_num_layers: tuple[int, int]
    projection_dim: int
    vae_block_out_channels: tuple[int, ...]
    vae_layers_per_block: int
    native_resolution: int  # pixels a side


SDXL = Shape(
    block_out_channels=(320, 640, 1280),
    transformer_depths=(0, 2, 10),
    addition_time_embed_dim=256,
    text_hidden_sizes=(768, 1280),
    text_num_layers=(12, 32),
    projection_dim=1280,
    vae_block_out_channels=(128, 256, 512, 512),
    vae_layers_per_block=2,
    native_resolution=1024,
)
TINY = Shape(
    block_out_channels=(32, 64, 128),
    transformer_depths=(0, 1, 2),
    addition_time_embed_dim=256,
    text_hidden_sizes=(64, 64),
    text_num_layers=(3, 3),
    projection_dim=64,
    vae_block_out_channels=(32, 32, 64, 64),
    vae_layers_per_block=1,
    native_resolution=128,
)


def write_sdxl(
    path: Path,
    shape: Shape = TINY,
    seed: int = 0,
    dtype: str = "fp16",
    vae: bool = True,
    v_pred: bool = False,
    ztsnr: bool = False,
) -> None:
    """Writes a single-file checkpoint with random weights whose U-Net answers with about unit variance.

    `v_pred` and `ztsnr` add the empty marker tensors that ComfyUI and Forge read. The same
    arguments give the same file.
    """
    torch_dtype, tag, element_bytes = DTYPES[dtype]
    shapes = dict(ldm_shapes(shape, vae))
    shapes |= {name: (0,) for name, wanted in (("v_pred", v_pred), ("ztsnr", ztsnr)) if wanted}
    header: dict = {"__metadata__": _metadata(shape, v_pred)}
    end = 0
    for name, dims in shapes.items():
        begin, end = end, end + torch.Size(dims).numel() * element_bytes
        header[name] = {"dtype": tag, "shape": list(dims), "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    scratch = Path(path).with_suffix(".partial")
    generator = torch.Generator().manual_seed(seed)
    with scratch.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, dims in shapes.items():
            tensor = _random_tensor(name, dims, generator).to(torch_dtype)
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
    scratch.replace(path)


def write_diffusers_folder(folder: Path, single_file: Path, dtype: torch.dtype = torch.float16) -> None:
    """The same model as `single_file`, as a diffusers folder (without tokenizers)."""
    base = inspect_base_model(single_file)
    encoders = load_text_encoders(base, dtype)
    load_unet(base, dtype).save_pretrained(folder / "unet")
    encoders.text_encoder.save_pretrained(folder / "text_encoder")
    encoders.text_encoder_2.save_pretrained(folder / "text_encoder_2")
    if base.has_vae:
        load_vae(base, None, dtype).save_pretrained(folder / "vae")
    scheduler = {"prediction_type": base.prediction_type or "epsilon", "rescale_betas_zero_snr": base.zero_terminal_snr}
    (folder / "scheduler").mkdir()
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"}))


def _metadata(shape: Shape, v_pred: bool) -> dict[str, str]:
    metadata = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": "random weights",
        "modelspec.resolution": f"{shape.native_resolution}x{shape.native_resolution}",
    }
    return metadata | ({"modelspec.prediction_type": "v"} if v_pred else {})


def ldm_shapes(shape: Shape, vae: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of the file, by its LDM name."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**unet_config(shape))
        clip_l = CLIPTextModel(CLIPTextConfig(**_text_config(shape, 0)))
        open_clip = CLIPTextModelWithProjection(CLIPTextConfig(**_text_config(shape, 1)))
        autoencoder = AutoencoderKL(**_vae_config(shape))
    for name, tensor in unet.state_dict().items():
        yield keys.UNET_PREFIX + keys.unet_to_ldm(name), tuple(tensor.shape)
    for name, tensor in clip_l.state_dict().items():
        yield keys.CLIP_L_PREFIX + keys.text_name(name), tuple(tensor.shape)
    for name, tensor in open_clip.state_dict().items():
        source = keys.open_clip_source(keys.text_name(name))
        stacked = 1 if source.third is None else 3
        dims = tuple(tensor.shape[::-1]) if source.transposed else (tensor.shape[0] * stacked, *tensor.shape[1:])
        yield keys.OPEN_CLIP_PREFIX + source.key, dims
    yield keys.OPEN_CLIP_PREFIX + "logit_scale", ()
    for name, tensor in autoencoder.state_dict().items() if vae else ():
        is_attention_matrix = ".attentions." in name and tensor.ndim == 2
        yield (
            keys.VAE_PREFIX + keys.vae_to_ldm(name),
            (*tensor.shape, 1, 1) if is_attention_matrix else tuple(tensor.shape),
        )


def unet_config(shape: Shape) -> dict:
    """UNet2DConditionModel's arguments."""
    return make_unet_config(
        block_out_channels=shape.block_out_channels,
        depths=shape.transformer_depths,
        cross_attention_dim=sum(shape.text_hidden_sizes),
        pooled_dim=shape.projection_dim,
        added_dim=shape.projection_dim + NUM_TIME_IDS * shape.addition_time_embed_dim,
        sample_size=shape.native_resolution // VAE_SCALE,
    )


def _text_config(shape: Shape, encoder: int) -> dict:
    hidden_size = shape.text_hidden_sizes[encoder]
    return make_text_encoder_config(
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_layers=shape.text_num_layers[encoder],
        projection_dim=shape.projection_dim if encoder else hidden_size,
        hidden_act="gelu" if encoder else "quick_gelu",
    )


def _vae_config(shape: Shape) -> dict:
    return make_vae_config(
        shape.vae_block_out_channels, shape.vae_layers_per_block, LATENT_CHANNELS, shape.native_resolution
    )


def _random_tensor(name: str, dims: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Weights of a network that is random but tame: unit variance in, about unit variance out."""
    if name.endswith("logit_scale"):
        return torch.tensor(LOGIT_SCALE)
    noise = torch.randn(dims, generator=generator)
    if name.startswith(keys.VAE_PREFIX + "quant_conv."):
        return _quant_conv(noise)
    if name.endswith("bias"):
        return noise.mul_(0.02)
    if len(dims) == 1:
        return noise.mul_(0.05).add_(1)
    if name.endswith("token_embedding.weight"):
        return noise.mul_(0.5)
    if name.endswith(("position_embedding.weight", "positional_embedding")):
        return noise.mul_(0.1)
    fan_in = dims[0] if name.endswith("text_projection") else noise[0].numel()
    return noise.mul_(_gain(name) / fan_in**0.5)


def _gain(name: str) -> float:
    if name.endswith("post_quant_conv.weight"):
        return VAE_SCALING_FACTOR
    if name == keys.UNET_PREFIX + "out.2.weight":
        return SILU_POWER**-0.5
    return BRANCH_GAIN if name.endswith(BRANCH_ENDS) else 1.0


def _quant_conv(noise: torch.Tensor) -> torch.Tensor:
    """The VAE's last encoder layer: latents of about unit variance once scaled by 0.13025, and little spread.

    Its first half makes the means, its second the log-variances.
    """
    means, log_variances = noise.chunk(2)
    if noise.ndim == 1:
        return torch.cat([means * 0.02, torch.full_like(log_variances, LOG_VARIANCE)])
    fan_in = noise.shape[1]
    return torch.cat([means / (VAE_SCALING_FACTOR * (SILU_POWER * fan_in) ** 0.5), log_variances * 0.01])


if __name__ == "__main__":
    write_sdxl(Path(sys.argv[1]))
