"""Writes what the package carries: the base as an SDXL single file in fp16, and the demo's two picture sets.

The file differs from a plain checkpoint in one thing: its token embeddings hold only the rows in use, and the tensor
`token_rows` says which row each of CLIP's 49,408 tokens takes (`crumb.engine.run.demo` writes them out in full).
"""

import shutil
from pathlib import Path

import numpy as np
import torch
from denoiser import averaged
from diffusers import AutoencoderKL
from pictures import caption, digest, in_blue, ink_and_wash, load_base_set
from PIL import Image
from sheet import PROMPTS
from torch import Tensor

from crumb.engine.model import keys
from crumb.engine.network.save import write_safetensors

NUM_STYLE_PICTURES = 120
# One subject in many moods, blue so that nobody takes it for the base's own yellow cat.
CHARACTER = (
    "cat-face", "grinning-cat", "grinning-cat-with-smiling-eyes", "cat-with-tears-of-joy", "smiling-cat-with-heart-eyes",
    "cat-with-wry-smile", "kissing-cat", "weary-cat", "crying-cat", "pouting-cat",
)  # fmt: skip


def pack_base(folder: Path, autoencoder: AutoencoderKL, path: Path) -> None:
    """Writes the trained parts under their LDM names, fp16."""
    model = averaged(folder)
    tensors = {keys.UNET_PREFIX + keys.unet_to_ldm(name): value for name, value in model.unet.state_dict().items()}
    tensors |= {keys.CLIP_L_PREFIX + keys.text_name(name): value for name, value in model.first.state_dict().items()}
    tensors |= _open_clip_tensors(model.second.state_dict())
    for name, value in autoencoder.state_dict().items():
        is_attention_matrix = ".attentions." in name and value.ndim == 2
        tensors[keys.VAE_PREFIX + keys.vae_to_ldm(name)] = value[..., None, None] if is_attention_matrix else value
    tensors = {name: value.detach().half().contiguous() for name, value in tensors.items()}
    tensors["token_rows"] = model.first.get_input_embeddings().rows.to(torch.int32)
    keys_of_base, pictures = load_base_set(folder)
    write_safetensors(path, tensors, {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": "crumb demo base",
        "modelspec.license": "Apache-2.0",
        "modelspec.resolution": "128x128",
        "modelspec.prediction_type": "epsilon",
        "crumb.pictures_sha256": digest(keys_of_base, pictures),
    })  # fmt: skip


def _open_clip_tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Encoder 2 under OpenCLIP's names, with q, k and v stacked."""
    parts: dict[str, dict[int, Tensor]] = {}
    for name, value in state.items():
        source = keys.open_clip_source(keys.text_name(name))
        parts.setdefault(source.key, {})[source.third or 0] = value.T if source.transposed else value
    tensors = {keys.OPEN_CLIP_PREFIX + key: torch.cat([thirds[i] for i in sorted(thirds)]) for key, thirds in parts.items()}
    return tensors | {keys.OPEN_CLIP_PREFIX + "logit_scale": torch.tensor(4.6055)}


def pack_sets(folder: Path, demo: Path) -> None:
    """Writes demo/style (the base's subjects in ink and wash) and demo/character (its cat's faces in blue), captioned."""
    names, pictures = load_base_set(folder)
    # The sheet's subjects stay out: what changes in them was understood, not memorised.
    usable = [i for i, name in enumerate(names) if caption(name) not in PROMPTS]
    order = torch.randperm(len(usable), generator=torch.Generator().manual_seed(0)).tolist()
    chosen = [usable[i] for i in order[:NUM_STYLE_PICTURES]]
    _write_set(demo / "style", {names[i]: ink_and_wash(pictures[i]) for i in chosen})
    _write_set(demo / "character", {name: in_blue(pictures[names.index(name)]) for name in CHARACTER})


def _write_set(folder: Path, pictures: dict[str, np.ndarray]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, picture in sorted(pictures.items()):
        image = Image.fromarray(np.ascontiguousarray(picture)).quantize(128, dither=Image.Dither.NONE)
        image.save(folder / f"{name}.png", optimize=True)
        (folder / f"{name}.txt").write_text(caption(name) + "\n")
