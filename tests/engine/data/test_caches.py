"""Cached latents and prompts: equal to a direct encode, made once, made again when torn, never silently wrong."""

import os
import stat
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from crumb.engine import faults
from crumb.engine.data import caches
from crumb.engine.data.caches import (
    View,
    cache_latents,
    cache_prompts,
    entry_path,
    latents_key,
    mask_key,
    read_entry,
    write_entry,
)
from crumb.engine.data.images import crop_picture, load_rgb, to_tensor
from crumb.profiles.buckets import assign
from crumb.profiles.dataset import scan_pictures
from crumb.profiles.errors import CrumbError


def quiet(done, total):
    pass


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=128,
    )


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    for name, size in {"a": (200, 140), "b": (150, 150), "c": (140, 300), "d": (220, 160)}.items():
        Image.effect_noise(size, 80).convert("RGB").save(folder / f"{name}.png")
    return [View(picture, assign(picture.width, picture.height, 128)) for picture in scan_pictures(folder).pictures]


def fill(pictures, vae, folder, **options):
    """Returns (paths, times the VAE was loaded, progress)."""
    loads, progress = [], []

    def load_vae():
        loads.append(1)
        return vae

    options = {"tiled": False, "device": "cpu", "on_progress": lambda *at: progress.append(at), **options}
    paths = cache_latents(pictures, load_vae, "vae-1", "fp32", folder, **options)
    return paths, len(loads), progress


@pytest.mark.parametrize("batch_size", [1, 3])
def test_latents_equal_a_direct_encode(tmp_path, pictures, vae, batch_size):
    paths, loads, progress = fill(pictures, vae, tmp_path / "cache", batch_size=batch_size)
    assert loads == 1 and progress[-1] == (4, 4) and progress == sorted(progress)
    for (picture, crop, _), path in zip(pictures, paths, strict=True):
        with torch.no_grad():
            pixels = to_tensor(crop_picture(load_rgb(picture.path), crop))
            posterior = vae.encode(pixels[None]).latent_dist
        entry = read_entry(path)
        assert entry["mean"].shape == entry["std"].shape == (4, crop.height // 2, crop.width // 2)
        torch.testing.assert_close(entry["mean"], posterior.mean[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(entry["std"], posterior.std[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_mirrored_latents_equal_a_direct_encode_of_the_mirrored_picture(tmp_path, pictures, vae, batch_size):
    """Each crop is cut out and mirrored by indexing here; mirrored latents of the plain picture are something else."""
    both = [*pictures, *(view._replace(mirrored=True) for view in pictures)]
    paths, loads, progress = fill(both, vae, tmp_path / "cache", batch_size=batch_size)
    assert loads == 1 and progress[-1] == (8, 8) and len(set(paths)) == 8
    for (picture, crop, _), plain, mirrored in zip(pictures, paths[:4], paths[4:], strict=True):
        resized = load_rgb(picture.path).resize((crop.resized_width, crop.resized_height), Image.Resampling.LANCZOS)
        rows = np.asarray(resized)[crop.top:crop.top + crop.height, crop.left:crop.left + crop.width]
        pixels = torch.tensor(rows[:, ::-1].astype(np.float32) / 127.5 - 1).permute(2, 0, 1)
        with torch.no_grad():
            posterior = vae.encode(pixels[None]).latent_dist
        entry = read_entry(mirrored)
        torch.testing.assert_close(entry["mean"], posterior.mean[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(entry["std"], posterior.std[0], atol=1e-5, rtol=1e-5)
        assert (entry["mean"] - read_entry(plain)["mean"].flip(-1)).abs().max() > 1e-3
    assert fill(both, vae, tmp_path / "cache")[1] == 0


def test_only_what_is_missing_torn_or_changed_is_made_again(tmp_path, pictures, vae):
    folder = tmp_path / "cache"
    paths, _, _ = fill(pictures, vae, folder)
    assert fill(pictures, vae, folder)[1] == 0, "the VAE was loaded although nothing was missing"
    whole = [path.read_bytes() for path in paths]
    paths[0].write_bytes(whole[0][:-100])
    flipped = bytearray(whole[1])
    flipped[-5] ^= 1
    paths[1].write_bytes(flipped)
    paths[2].write_bytes(b"")
    before = paths[3].stat().st_mtime_ns
    assert read_entry(paths[1]) is None and not paths[1].exists()
    again, loads, progress = fill(pictures, vae, folder)
    assert again == paths and loads == 1 and progress[-1] == (4, 4)
    assert [path.read_bytes() for path in paths] == whole
    assert paths[3].stat().st_mtime_ns == before


def test_pictures_of_equal_bytes_share_an_entry(tmp_path, pictures, vae):
    paths, _, progress = fill([pictures[0], pictures[0], pictures[1]], vae, tmp_path / "cache")
    assert paths[0] == paths[1] != paths[2] and progress[-1] == (3, 3)


def test_keys_depend_on_all_that_changes_the_content():
    crop = assign(2000, 1500, 1024)
    variants = [
        latents_key("0" * 64, crop, "vae", "bf16"),
        latents_key("1" * 64, crop, "vae", "bf16"),
        latents_key("0" * 64, assign(2000, 1600, 1024), "vae", "bf16"),
        latents_key("0" * 64, assign(2000, 1500, 512), "vae", "bf16"),
        latents_key("0" * 64, crop, "other vae", "bf16"),
        latents_key("0" * 64, crop, "vae", "fp32"),
        latents_key("0" * 64, crop, "vae", "bf16", tiled=True),
        latents_key("0" * 64, crop, "vae", "bf16", mirrored=True),
        *(mask_key(digest * 64, kind, crop) for digest in "01" for kind in ("alpha", "files")),
        mask_key("0" * 64, "alpha", assign(2000, 1500, 512)),
    ]
    assert variants[0] == latents_key("0" * 64, assign(2000, 1500, 1024), "vae", "bf16")
    assert len(set(variants)) == len(variants)


def test_names_of_plain_entries_never_change():
    """Golden: what was encoded before there were mirrored pictures and masks is found again."""
    crop = assign(2000, 1500, 1024)
    assert latents_key("0" * 64, crop, "vae", "bf16") == "940b309764a593c58ea5e9a647b08b337c3bf2b434c66f4932ad38706546e0cc"
    tiled = latents_key("0" * 64, crop, "vae", "bf16", tiled=True)
    assert tiled == "04748b4ac99faca777f21deebda28d16e0a84cd393ff8697dc364a1851972a78"


def test_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    path = entry_path(tmp_path, "ab" + "c" * 62)
    write_entry(path, {"x": torch.ones(3)})

    def interrupted(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_entry(path, {"x": torch.zeros(3)})
    assert os.listdir(path.parent) == [path.name]
    assert read_entry(path)["x"].tolist() == [1, 1, 1]


def test_full_disk_is_a_named_error(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CrumbError, match="No space left on device"):
        write_entry(entry_path(tmp_path, "ab" + "c" * 62), {"x": torch.ones(3)})


def test_entries_are_private(tmp_path):
    path = entry_path(tmp_path / "cache", "ab" + "c" * 62)
    assert path == tmp_path / "cache" / "ab" / ("c" * 62 + ".safetensors")
    write_entry(path, {"x": torch.ones(2, 3).T, "y": torch.ones(1, dtype=torch.bfloat16)})
    modes = [stat.S_IMODE(place.stat().st_mode) for place in (path, path.parent, path.parent.parent)]
    assert modes == [0o600, 0o700, 0o700]
    entry = read_entry(path)
    assert entry["x"].shape == (3, 2) and entry["y"].dtype == torch.bfloat16


class BrokenVae(torch.nn.Module):
    """Gives NaN for pictures that are brighter than they are dark."""
    device = torch.device("cpu")

    dtype = torch.float16

    def encode(self, pixels):
        mean = torch.zeros(len(pixels), 4, pixels.shape[2] // 8, pixels.shape[3] // 8, dtype=self.dtype)
        mean[pixels.mean(dim=(1, 2, 3)) > 0] = float("nan")
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, std=torch.ones_like(mean)))


def test_nan_names_the_picture_and_is_not_cached(tmp_path):
    for name, grey in {"dark": 20, "bright": 240}.items():
        Image.new("L", (130, 130), grey).save(tmp_path / f"{name}.png")
    pictures = [View(picture, assign(130, 130, 128)) for picture in scan_pictures(tmp_path).pictures]
    with pytest.raises(CrumbError, match=r"bright\.png.*float16.*bfloat16"):
        fill(pictures, BrokenVae(), tmp_path / "cache", batch_size=2)
    names = [path.name for path in (tmp_path / "cache").rglob("*.safetensors")]
    assert len(names) <= 1


def test_where_the_gpu_has_no_room_the_processor_encodes(tmp_path, pictures, vae, monkeypatch):
    plain, _, _ = fill(pictures, vae, tmp_path / "plain")
    monkeypatch.setattr(faults, "_left", ["out of memory: cache latents", "out of memory: cache captions"])
    paths, _, progress = fill(pictures, vae, tmp_path / "cache")
    assert faults._left == ["out of memory: cache captions"] and progress[-1] == (len(pictures), len(pictures))
    assert all(torch.equal(read_entry(path)["mean"], read_entry(other)["mean"]) for path, other in zip(paths, plain))

    devices = []
    cache_prompts(["a", "b"], devices.append, lambda *_: (torch.zeros(1, 77, 4), torch.zeros(1, 4)), "clip", "fp32", tmp_path,
                  on_progress=quiet, device="cuda")
    assert devices == ["cpu"] and not faults._left


def test_picture_that_changes_or_vanishes_is_named(tmp_path, pictures, vae):
    picture = pictures[0].picture
    Image.new("RGB", (100, 100)).save(picture.path)
    with pytest.raises(CrumbError, match=r"a\.png.*changed"):
        fill(pictures, vae, tmp_path / "cache")
    picture.path.unlink()
    with pytest.raises(CrumbError, match=r"a\.png"):
        fill(pictures, vae, tmp_path / "cache")


def test_tiled_encoding_is_kept_apart(tmp_path, vae):
    Image.effect_noise((300, 150), 80).convert("RGB").save(tmp_path / "wide.png")
    pictures = [View(picture, assign(300, 150, 128)) for picture in scan_pictures(tmp_path).pictures]
    (whole,), _, _ = fill(pictures, vae, tmp_path / "cache")
    (tiled,), loads, _ = fill(pictures, vae, tmp_path / "cache", tiled=True)
    vae.disable_tiling()
    assert whole != tiled and loads == 1
    assert read_entry(whole)["mean"].shape == read_entry(tiled)["mean"].shape


def test_prompts_are_encoded_once_each(tmp_path):
    encoded, loads, progress = [], [], []

    def load_text_encoders(device):
        loads.append(device)
        return "encoders"

    def encode(text_encoders, prompts):
        encoded.extend(prompts)
        value = float(len(prompts[0]))
        return torch.full((1, 77, 16), value, dtype=torch.bfloat16), torch.full((1, 8), value)

    def run(prompts):
        return cache_prompts(
            prompts, load_text_encoders, encode, "clip", "bf16", tmp_path, on_progress=lambda *at: progress.append(at),
            device="cpu")

    paths = run(["a cat", "", "a cat", "一只猫"])
    assert encoded == ["a cat", "", "一只猫"] and progress[-1] == (3, 3) and len(set(paths.values())) == 3
    entry = read_entry(paths["一只猫"])
    assert entry["encoder_hidden_states"].shape == (77, 16) and entry["encoder_hidden_states"].dtype == torch.bfloat16
    assert entry["pooled"].tolist() == [3.0] * 8
    assert run(["a cat", ""]) == {prompt: paths[prompt] for prompt in ("a cat", "")} and len(loads) == 1


def test_nan_names_the_prompt(tmp_path):
    def encode(text_encoders, prompts):
        return torch.full((1, 77, 16), float("inf"), dtype=torch.float16), torch.zeros(1, 8)

    with pytest.raises(CrumbError, match=r'"a cat".*float16'):
        cache_prompts(["a cat"], lambda device: None, encode, "clip", "fp16", tmp_path, on_progress=quiet, device="cpu")
    assert caches.read_entry(entry_path(tmp_path, caches.prompt_key("a cat", "clip", "fp16"))) is None
