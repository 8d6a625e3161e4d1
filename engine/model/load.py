"""Loads the parts of an SDXL base model: U-Net, VAE and text encoders, frozen and in the dtype asked for.

Modules are made without storage, then each tensor is read, cast and placed alone, so that memory holds one copy of
a part and one tensor more. Single files and diffusers folders meet in `Weights`, after which there is one way.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from crumb.engine.model import keys
from crumb.engine.model.config import VAE_SCALING_FACTOR, text_encoder_config, unet_config, vae_config
from crumb.engine.model.keys import Source
from crumb.engine.model.tokenizer import make_tokenizers
from crumb.engine.model.weights import Weights, fill, find_weights
from crumb.profiles.base_model import VAE_SCALE, BaseModel, weight_files
from crumb.profiles.errors import RequestError
from crumb.profiles.safetensors_header import read_header

LATENT_CHANNELS = 4


@dataclass
class TextEncoders:
    text_encoder: CLIPTextModel
    text_encoder_2: CLIPTextModelWithProjection
    tokenizer: CLIPTokenizer
    tokenizer_2: CLIPTokenizer


def load_unet(base: BaseModel, dtype: torch.dtype, device: torch.device | str = "cpu") -> UNet2DConditionModel:
    """The U-Net, frozen and in eval mode. RequestError where tensors are missing or unexpected."""
    weights = _unet_weights(base)
    with torch.device("meta"):
        unet = UNet2DConditionModel(**_unet_config(base, weights))
    return fill(unet, weights, dtype, device)


def unet_config_of(base: BaseModel) -> dict:
    """UNet2DConditionModel's arguments, from the headers of the base's files."""
    return _unet_config(base, _unet_weights(base))


def load_vae(
    base: BaseModel, vae_path: Path | None, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> AutoencoderKL:
    """The VAE of `vae_path` (a .safetensors file with either kind of names, or a diffusers folder), else the base's."""
    weights = _baked_vae(base) if vae_path is None else _separate_vae(Path(vae_path))
    _needed(weights, "encoder.conv_in.weight")
    latent_channels = _needed(weights, "encoder.conv_out.weight")[0] // 2
    if latent_channels != LATENT_CHANNELS:
        raise RequestError(
            f"The VAE in {weights.origin} has {latent_channels} latent channels and SDXL has {LATENT_CHANNELS}: "
            "choose an SDXL VAE."
        )
    with torch.device("meta"):
        vae = AutoencoderKL(**vae_config(weights.shapes, base.native_resolution))
    return fill(vae, weights, dtype, device)


def tile_vae(vae: AutoencoderKL) -> None:
    """Makes the VAE work in tiles of 512 pixels. diffusers' own tiles are as large as SDXL's pictures: no tiles at all."""
    vae.enable_tiling()
    vae.tile_sample_min_size, vae.tile_latent_min_size = 512, 512 // VAE_SCALE


def load_text_encoders(base: BaseModel, dtype: torch.dtype, device: torch.device | str = "cpu") -> TextEncoders:
    """CLIP-L and OpenCLIP bigG, frozen and in eval mode, with their tokenizers."""
    if base.layout == "diffusers":
        clip_l = _folder_weights(base.path, "text_encoder", keys.text_name)
    else:
        clip_l = _file_weights(base.path, keys.CLIP_L_PREFIX + "text_model.", keys.text_name)
    open_clip = _open_clip_weights(base)
    for weights in (clip_l, open_clip):
        _needed(weights, "text_model.embeddings.position_embedding.weight")
        _needed(weights, "text_model.embeddings.token_embedding.weight")
        _needed(weights, "text_model.encoder.layers.0.mlp.fc1.weight")
    with torch.device("meta"):
        text_encoder = CLIPTextModel(CLIPTextConfig(**text_encoder_config(clip_l.shapes, "quick_gelu")))
        text_encoder_2 = CLIPTextModelWithProjection(CLIPTextConfig(**text_encoder_config(open_clip.shapes, "gelu")))
    tokenizer, tokenizer_2 = make_tokenizers()
    return TextEncoders(
        text_encoder=fill(text_encoder, clip_l, dtype, device, keys.text_name),
        text_encoder_2=fill(text_encoder_2, open_clip, dtype, device, keys.text_name),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
    )


def _unet_weights(base: BaseModel) -> Weights:
    if base.layout == "diffusers":
        return _folder_weights(base.path, "unet", str)
    return _file_weights(base.path, keys.UNET_PREFIX, keys.unet_from_ldm)


def _unet_config(base: BaseModel, weights: Weights) -> dict:
    pooled_dim = _needed(_open_clip_weights(base), "text_projection.weight")[0]
    _needed(weights, "add_embedding.linear_1.weight")
    return unet_config(weights.shapes, pooled_dim, base.native_resolution // VAE_SCALE)


def _open_clip_weights(base: BaseModel) -> Weights:
    if base.layout == "diffusers":
        return _folder_weights(base.path, "text_encoder_2", keys.text_name)
    return find_weights(
        base.path,
        [base.path],
        keys.OPEN_CLIP_PREFIX,
        lambda key: {name: keys.open_clip_source(name) for name in keys.open_clip_names(key)},
    )


def _baked_vae(base: BaseModel) -> Weights:
    if not base.has_vae:
        raise RequestError(
            f"{base.path} has no VAE inside: name one beside it (such as sdxl_vae.safetensors or sdxl-vae-fp16-fix)."
        )
    if base.layout == "diffusers":
        return _vae_folder(base.path, "vae")
    return _file_weights(base.path, keys.VAE_PREFIX, keys.vae_from_ldm)


def _separate_vae(path: Path) -> Weights:
    if not path.exists():
        raise RequestError(f"There is no VAE at {path}: check the path (a .safetensors file or a diffusers folder).")
    if path.is_dir():
        return _vae_folder(path, "vae" if (path / "vae").is_dir() else "")
    names = read_header(path)[0]
    prefix = keys.VAE_PREFIX if any(name.startswith(keys.VAE_PREFIX) for name in names) else ""
    in_diffusers = any(".mid_block." in name for name in names)
    return _file_weights(path, prefix, keys.vae_modern_name if in_diffusers else keys.vae_from_ldm)


def _vae_folder(folder: Path, part: str) -> Weights:
    config_path = folder / part / "config.json"
    try:
        factor = json.loads(config_path.read_bytes()).get("scaling_factor", VAE_SCALING_FACTOR)
    except (OSError, ValueError, AttributeError):
        raise RequestError(f"{config_path} is missing or is not JSON: fetch the whole VAE folder.") from None
    if factor != VAE_SCALING_FACTOR:
        raise RequestError(
            f"{config_path} has scaling_factor {factor} and SDXL's VAE has {VAE_SCALING_FACTOR}: choose an SDXL VAE."
        )
    return _folder_weights(folder, part, keys.vae_modern_name)


def _file_weights(path: Path, prefix: str, rename: Callable[[str], str]) -> Weights:
    return find_weights(path, [path], prefix, lambda key: {rename(key): Source(key)})


def _folder_weights(folder: Path, part: str, rename: Callable[[str], str]) -> Weights:
    files = weight_files(folder, part)
    if not files:
        raise RequestError(
            f"{folder / part} has no .safetensors weights (pickled .bin ones are not read, since they can run code): "
            "fetch the .safetensors version."
        )
    return find_weights(folder / part, files, "", lambda key: {rename(key): Source(key)})


def _needed(weights: Weights, name: str) -> tuple[int, ...]:
    """The shape of a tensor that the config is inferred from."""
    if name not in weights.sources:
        raise RequestError(
            f"{weights.origin} lacks the tensor {name}: it is damaged or of another kind. Choose another file."
        )
    return weights.shapes[name]
