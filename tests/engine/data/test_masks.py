"""Masks at latent size, against averages worked out in float64; and what can't be a mask."""

import numpy as np
import pytest
import torch
from PIL import Image

from crumb.engine.data.caches import read_entry
from crumb.engine.data.images import decode_mask
from crumb.engine.data.masks import cache_masks, mask_tensor
from crumb.profiles.buckets import Crop, assign
from crumb.profiles.errors import RequestError
from crumb.profiles.pictures import Mask

RANDOM = np.random.default_rng(3)


def averages(greys: np.ndarray, factor: int) -> np.ndarray:
    """Means over squares of `factor` pixels, 0..255 to 0..1."""
    height, width = greys.shape
    return greys.reshape(height // factor, factor, width // factor, factor).astype(np.float64).mean((1, 3)) / 255


def test_each_value_is_the_share_of_white_under_it():
    greys = RANDOM.integers(0, 256, (128, 192), dtype=np.uint8)
    crop = Crop(128, 64, 192, 128, left=32, top=40)
    got = mask_tensor(Image.fromarray(greys), crop)
    assert got.shape == (1, 8, 16) and got.dtype == torch.float32
    torch.testing.assert_close(got[0].double(), torch.tensor(averages(greys[40:104, 32:160], 8)), atol=1e-6, rtol=0)


def test_it_is_scaled_and_cut_as_its_picture():
    """768x384 is scaled by a third to 256x128, of which 64 columns fall away on either side of 128x128."""
    crop = assign(768, 384, 128, buckets=False)
    assert crop == Crop(128, 128, 256, 128, 64, 0)
    greys = np.where(RANDOM.random((384, 768)) > 0.5, 255, 0).astype(np.uint8)
    expected = torch.tensor(averages(greys, 24)[:, 8:24])
    # Pillow rounds to 8 bits once between the two averages.
    torch.testing.assert_close(mask_tensor(Image.fromarray(greys), crop)[0].double(), expected, atol=1 / 255, rtol=0)
    small = mask_tensor(Image.fromarray(greys[::3, ::3]), crop)
    large = mask_tensor(Image.fromarray(greys[::3, ::3].repeat(3, 0).repeat(3, 1)), crop)
    assert torch.equal(small, large), "a mask of another size than its picture covers the same ground"


def test_black_and_white_stay_what_they_are():
    """An edge must not ring: Lanczos would give values beside it that are neither."""
    greys = np.zeros((300, 300), np.uint8)
    greys[:, 150:] = 255
    mask = mask_tensor(Image.fromarray(greys), assign(300, 300, 128))[0]
    assert (mask[:, :7] == 0).all() and (mask[:, 9:] == 1).all()


def kept(folder, name, image, **options):
    image.save(folder / name, **options)
    return (folder / name).read_bytes(), folder / name


def test_every_way_to_keep_a_mask_gives_the_same_greys(tmp_path):
    grey = Image.fromarray(np.tile(np.linspace(0, 255, 96).round().astype(np.uint8), (80, 1)))
    expected = np.asarray(grey)
    white = Image.new("L", grey.size, 255)
    nothing = Image.merge("RGBA", [white, white, white, grey])
    files = {"grey.png": grey, "rgb.png": grey.convert("RGB"), "painted on nothing.png": nothing,
             "deep.png": Image.fromarray(expected.astype(np.uint16) * 257)}
    for name, image in files.items():
        assert (np.asarray(decode_mask(*kept(tmp_path, name, image), "files")) == expected).all(), name
    for name, image in {"rgba.png": nothing, "la.png": Image.merge("LA", [white, grey])}.items():
        assert (np.asarray(decode_mask(*kept(tmp_path, name, image), "alpha")) == expected).all(), name
    assert (np.asarray(decode_mask(*kept(tmp_path, "solid.png", grey), "alpha")) == 255).all()

    exif = Image.Exif()
    exif[0x0112] = 6
    for kind, image in (("files", grey), ("alpha", nothing)):
        turned = decode_mask(*kept(tmp_path, f"turned {kind}.png", image, exif=exif), kind)
        assert (np.asarray(turned) == np.rot90(expected, -1)).all(), "turned as its picture is"


def test_entries_are_made_once_and_follow_the_mask_bytes(tmp_path):
    crop, cache, progress = assign(128, 128, 128), tmp_path / "cache", []
    mask = Mask("files", tmp_path / "m.png")
    Image.new("L", (128, 128), 255).save(mask.path)

    def cached():
        return cache_masks({7: (mask, crop)}, cache, lambda *at: progress.append(at))

    first = cached()
    before = first[7].stat().st_mtime_ns
    assert list(first) == [7] and cached() == first and first[7].stat().st_mtime_ns == before and progress == [(1, 1)] * 2
    assert read_entry(first[7])["mask"].shape == (1, 16, 16)
    Image.new("L", (128, 128), 100).save(mask.path)
    assert cached() != first
    assert cache_masks({7: (Mask("alpha", mask.path), crop)}, cache, lambda *at: None) != cached()


def test_a_mask_that_is_black_where_the_picture_is_trained_is_refused(tmp_path):
    greys = np.zeros((128, 400), np.uint8)
    greys[:, :20] = 255
    Image.fromarray(greys).save(tmp_path / "edge.png")
    wide = assign(400, 128, 128, buckets=False)
    with pytest.raises(RequestError, match=r"edge\.png.*128 x 128 of 400 x 128"):
        cache_masks({0: (Mask("files", tmp_path / "edge.png"), wide)}, tmp_path / "cache", lambda *at: None)
