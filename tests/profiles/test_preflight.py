"""What a plan's own files are checked for before a run starts."""

import pytest
from PIL import Image

from crumb.profiles import preflight as preflight_module
from crumb.profiles.errors import RequestError
from crumb.profiles.preflight import preflight


def test_pictures_that_cant_be_read_are_left_out_only_with_consent(tiny_base, tmp_path, make_plan):
    for name in ("torn", "whole"):
        Image.effect_noise((128, 128), 90).save(tmp_path / f"{name}.png")
    data = (tmp_path / "torn.png").read_bytes()
    (tmp_path / "torn.png").write_bytes(data[:len(data) // 2])
    settings = {"base_model": str(tiny_base), "images": str(tmp_path)}
    with pytest.raises(RequestError, match=r"1 of the pictures.*torn\.png.*skip-broken"):
        preflight(make_plan(skip_broken=False, **settings))
    facts = preflight(make_plan(skip_broken=True, **settings))
    assert [picture.path.name for picture in facts.scan.pictures] == ["whole.png"]


def test_what_the_machine_or_the_vae_cant_give_is_named(tiny_base, tmp_path, make_plan, monkeypatch):
    monkeypatch.setattr(preflight_module, "detect_gpu", lambda: None)
    Image.effect_noise((128, 128), 90).save(tmp_path / "a.png")
    settings = {"base_model": str(tiny_base), "images": str(tmp_path)}
    for wrong, words in [({"device": "cuda"}, "no NVIDIA GPU answers"), ({"device": "auto", "mixed_precision": "fp16"}, "fp16"),
                         ({"vae": str(tmp_path / "none.safetensors")}, "no VAE at"),
                         ({"vae": str(tiny_base)}, "not a VAE")]:
        with pytest.raises(RequestError, match=words):
            preflight(make_plan(**settings | wrong))
    assert len(preflight(make_plan(device="auto", **settings)).scan.pictures) == 1
