"""Device and formats: what fp16 must not be used for, and what a machine can't give."""

import pytest
import torch

from crumb.engine.memory.placement import Placement, choose_placement
from crumb.engine.model.load import load_vae, tile_vae
from crumb.profiles.base_model import inspect_base_model
from crumb.profiles.errors import RequestError
from crumb.profiles.fit import Fit
from crumb.profiles.plan import Plan

REQUIRED = {"name": "t", "created": "2026-01-01T00:00:00+00:00", "base_model": "b", "images": "p"}


@pytest.mark.parametrize(("dtype", "encoders"), [
    (torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)])
def test_encoders_never_run_in_fp16_where_the_vae_overflows(dtype, encoders):
    assert Placement(torch.device("cuda"), dtype).encoder_dtype == encoders


def test_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for settings in ({"device": "cuda"}, {"device": "auto", "mixed_precision": "fp16"}):
        with pytest.raises(RequestError):
            choose_placement(Plan(**REQUIRED, **settings))
    for precision, dtype in (("no", torch.float32), ("bf16", torch.bfloat16)):
        placement = choose_placement(Plan(**REQUIRED, device="auto", mixed_precision=precision, quantize_base="int8",
                                          int8_activations=True, batch_size=3))
        assert placement == Placement(torch.device("cpu"), dtype, Fit("int8", True, micro_batch=3))


def test_tiles_are_really_used_at_sdxls_own_size(tiny_base, monkeypatch):
    """diffusers tiles only above its tile size, which for SDXL is the whole picture."""
    vae = load_vae(inspect_base_model(tiny_base), None, torch.float32)
    vae.tile_sample_min_size, vae.tile_latent_min_size = 1024, 128  # what diffusers sets for SDXL
    tile_vae(vae)
    seen = []
    for name in ("_tiled_encode", "tiled_decode"):
        real = getattr(vae, name)
        monkeypatch.setattr(vae, name, lambda *a, real=real, name=name, **k: (seen.append(name), real(*a, **k))[1])
    with torch.no_grad():
        latents = vae.encode(torch.zeros(1, 3, 1024, 1024)).latent_dist.mean
        assert latents.shape == (1, 4, 128, 128)
        assert vae.decode(latents).sample.shape == (1, 3, 1024, 1024)
    assert seen == ["_tiled_encode", "tiled_decode"]
