"""Loads the parts of an SDXL base model: U-Net, VAE and text encoders, frozen and in the dtype asked for.

Modules are made without storage, then each tensor is read, cast or quantised, and placed alone, so that memory holds one
copy of a part as it stays and one tensor more. Single files and diffusers folders meet in `Weights`, after which there is
one way.
"""

import json
import logging
from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from crumb.engine.model import keys
from crumb.engine.model.config import VAE_SCALING_FACTOR, text_encoder_config, unet_config, vae_config
from crumb.engine.model.frozen import format_of, freeze_layers
from crumb.engine.model.keys import Source
from crumb.engine.model.tokenizer import make_tokenizers
from crumb.engine.model.unet_cache import Entry, Value, read_unet, writing
from crumb.engine.model.weights import OnProgress, Weights, exactly, fill, find_weights
from crumb.profiles.base_model import VAE_SCALE, BaseModel, weight_files
from crumb.profiles.errors import RequestError
from crumb.profiles.safetensors_header import read_header
from crumb.profiles.vram import WEIGHT_BYTES

log = logging.getLogger("crumb")
LATENT_CHANNELS = 4


@dataclass
class TextEncoders:
    text_encoder: CLIPTextModel
    text_encoder_2: CLIPTextModelWithProjection
    tokenizer: CLIPTokenizer
    tokenizer_2: CLIPTokenizer


def load_unet(base: BaseModel, dtype: torch.dtype, device: torch.device | str = "cpu", quantise: str = "no",
              streamed: Collection[str] = (), base_sha256: str | None = None, on_progress: OnProgress | None = None,
              warn: Callable[[str], None] = log.warning) -> UNet2DConditionModel:
    """The U-Net in eval mode with frozen layers, convolutions channels last. RequestError where tensors are missing or foreign.

    `quantise`: no | int8 | nf4, of the layers in blocks, each as soon as it is read. What lies in the modules that
    `streamed` names stays on the CPU. A quantised U-Net is kept in the cache for the next time where `base_sha256` (the
    base's fingerprint) is given; `warn` is told what is wrong with the cache. `on_progress(done_bytes, total_bytes)`.
    """
    weights = _unet_weights(base)
    config = _unet_config(base, weights)
    device = torch.device(device)
    home = partial(_home, device, tuple(f"{module}." for module in streamed))
    entry = Entry(base_sha256, quantise, dtype) if base_sha256 and quantise != "no" else None
    if entry:
        unet = _empty_unet(config)
        if read_unet(unet, entry, home, on_progress, warn):
            return unet.eval()
    unet = _empty_unet(config)
    num_bytes = round(base.num_unet_parameters * WEIGHT_BYTES[quantise][0] * 1.2)  # most are in linears, the others larger
    with writing(entry, unet, num_bytes, warn) if entry else nullcontext(lambda name, value: None) as keep:
        def arrive(name: str, tensor: Tensor) -> Value:
            value = _unet_value(name, tensor, dtype, device, home(name), quantise, weights.origin)
            keep(name, value)
            return value

        return fill(unet, weights, arrive, on_progress=on_progress)


def _home(device: torch.device, streamed: tuple[str, ...], name: str) -> torch.device:
    return torch.device("cpu") if name.startswith(streamed) else device


def _empty_unet(config: dict) -> UNet2DConditionModel:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    freeze_layers(unet)
    return unet


def _unet_value(name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device, home: torch.device, quantise: str,
                origin: Path) -> Value:
    """The tensor as the U-Net keeps it. It is quantised on `device`, which holds no more than it and the result."""
    # What convolutions are fastest in, and tokens are a view of.
    tensor = tensor.to(dtype, memory_format=torch.channels_last) if tensor.dim() == 4 else tensor.to(dtype)
    quantised = format_of(name, tensor.shape, quantise)
    if quantised is None:
        return nn.Parameter(tensor.to(home), requires_grad=False)
    try:
        return quantised.of(tensor.to(device)).to(home)
    except ValueError as error:
        raise RequestError(f"{origin}: {name} can't be quantised, since {error} (in {dtype}). The file is damaged, or its "
                           f"weights need another number format: set mixed_precision = \"bf16\", or choose another "
                           f"base.") from None


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
    return fill(vae, weights, exactly(dtype, device))


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
        text_encoder=fill(text_encoder, clip_l, exactly(dtype, device), keys.text_name),
        text_encoder_2=fill(text_encoder_2, open_clip, exactly(dtype, device), keys.text_name),
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
