"""The packaged demo: its base is a true SDXL file once written out, its sets are whole and named."""

from importlib.resources import files

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from crumb.engine.model.load import load_text_encoders, load_unet, load_vae
from crumb.engine.model.text import encode_prompts
from crumb.engine.run.demo import demo_folder, write_demo_base
from crumb.profiles.base_model import inspect_base_model
from crumb.profiles.dataset import scan_pictures

EMBEDDINGS = (
    "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight",
    "conditioner.embedders.1.model.token_embedding.weight",
)


@pytest.fixture(scope="module")
def demo_base(tmp_path_factory):
    return write_demo_base(tmp_path_factory.mktemp("demo"))


def test_the_base_is_written_out_once_with_a_row_for_every_token(demo_base):
    packaged = load_file(files("crumb.engine") / "demo" / "base.safetensors")
    full = load_file(demo_base)
    rows = packaged.pop("token_rows")
    assert set(full) == set(packaged)
    for name, tensor in full.items():
        expected = packaged[name][rows] if name in EMBEDDINGS else packaged[name]
        assert torch.equal(tensor, expected), name
    assert full[EMBEDDINGS[0]].shape[0] == 49408
    before = demo_base.stat().st_mtime_ns
    assert write_demo_base(demo_base.parent) == demo_base and demo_base.stat().st_mtime_ns == before


def test_the_base_loads_and_tells_prompts_apart(demo_base):
    base = inspect_base_model(demo_base)
    assert (base.layout, base.native_resolution, base.prediction_type, base.has_vae) == ("single_file", 128, "epsilon", True)
    assert load_unet(base, torch.float32).config.in_channels == 4
    hidden, pooled = encode_prompts(load_text_encoders(base, torch.float32), ["red apple", "sun", "crumbdemo, sun"])
    assert torch.isfinite(hidden).all()
    assert (pooled[0] - pooled[1]).norm() > 0.1 * pooled[0].norm(), (pooled[0] - pooled[1]).norm()


def test_the_autoencoder_gives_pictures_back(demo_base):
    """Decoding what it encoded is far closer to the picture than the picture's own mean colour is."""
    vae = load_vae(inspect_base_model(demo_base), None, torch.float32)
    with Image.open(demo_folder("character") / "cat-face.png") as image:
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor
        error = (vae.decode(latents / vae.config.scaling_factor).sample - pixels).square().mean()
    spread = (pixels - pixels.mean(dim=(2, 3), keepdim=True)).square().mean()
    assert error < 0.2 * spread, (error, spread)
    assert 0.3 < latents.std() < 3, latents.std()


@pytest.mark.parametrize(("name", "num_pictures"), [("style", 120), ("character", 10)])
def test_the_sets_are_whole_and_captioned(name, num_pictures):
    folder = demo_folder(name)
    scan = scan_pictures(folder)
    assert len(scan.pictures) == num_pictures and not scan.problems
    assert all(picture.caption and (picture.width, picture.height) == (128, 128) for picture in scan.pictures)
    assert sum(file.stat().st_size for file in folder.iterdir()) < 1_000_000
