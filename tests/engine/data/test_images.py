"""Pictures of every odd kind become the same upright sRGB, compared with pixels worked out by hand."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, features

from crumb.engine.data.images import crop_picture, load_rgb, to_tensor
from crumb.profiles.buckets import assign
from crumb.profiles.dataset import scan_pictures
from crumb.profiles.errors import CrumbError

RAMP = np.tile(np.linspace(0, 1, 96), (80, 1))


def saved(folder, name, image, **options):
    image.save(folder / name, **options)
    return folder / name


def assert_pixels(path, expected, tolerance=1):
    """`expected` is (H, W, 3) or (H, W), 0..255."""
    expected = np.asarray(expected, dtype=np.float64)
    if expected.ndim == 2:
        expected = np.repeat(expected[:, :, None], 3, axis=2)
    image = load_rgb(path)
    assert image.mode == "RGB" and image.size == expected.shape[1::-1]
    error = np.abs(np.asarray(image, dtype=np.float64) - expected).max()
    assert error <= tolerance, f"{path.name}: off by up to {error}"


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif", ".avif"])
def test_exif_rotation(tmp_path, suffix):
    if suffix == ".avif" and not features.check("avif"):
        pytest.skip("Pillow without AVIF")
    stored = np.zeros((100, 200, 3), np.uint8)
    stored[:, :100] = (250, 10, 10)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = saved(tmp_path, f"phone{suffix}", Image.fromarray(stored), exif=exif)
    image = load_rgb(path)
    (picture,) = scan_pictures(tmp_path).pictures
    assert image.size == (picture.width, picture.height) == (100, 200)
    assert image.getpixel((50, 20))[0] > 200 and image.getpixel((50, 180))[0] < 50


def test_alpha_is_laid_on_white(tmp_path):
    alpha = np.tile(np.linspace(0, 255, 96).round().astype(np.uint8), (80, 1))
    on_white = 255 - alpha.astype(float)
    black = np.zeros_like(alpha)
    assert_pixels(saved(tmp_path, "rgba.png", Image.fromarray(np.dstack([black, black, black, alpha]))), on_white)
    assert_pixels(saved(tmp_path, "la.png", Image.fromarray(np.dstack([black, alpha]), "LA")), on_white)
    lossless = Image.fromarray(np.dstack([black, black, black, alpha]))
    assert_pixels(saved(tmp_path, "rgba.webp", lossless, lossless=True), on_white)


def test_palettes(tmp_path):
    indices = np.zeros((80, 96), np.uint8)
    indices[:, 32:64], indices[:, 64:] = 1, 2
    image = Image.fromarray(indices, "P")
    image.putpalette([200, 0, 0, 0, 150, 0, 0, 0, 99])
    colors = np.array([[200, 0, 0], [0, 150, 0], [0, 0, 99]])
    assert_pixels(saved(tmp_path, "plain.png", image), colors[indices], 0)
    colors[1] = 255
    assert_pixels(saved(tmp_path, "one clear color.png", image, transparency=1), colors[indices], 0)
    assert_pixels(saved(tmp_path, "clear.gif", image, transparency=1), colors[indices], 0)
    half = bytes([255, 0, 127])
    colors[2] = (128, 128, 177)
    assert_pixels(saved(tmp_path, "alpha per color.png", image, transparency=half), colors[indices])


def test_deep_greys_are_scaled_not_clipped(tmp_path):
    sixteen = (RAMP * 65535).round().astype(np.uint16)
    expected = RAMP * 255
    assert_pixels(saved(tmp_path, "sixteen.png", Image.fromarray(sixteen)), expected)
    assert_pixels(saved(tmp_path, "sixteen.tif", Image.fromarray(sixteen)), expected)
    assert_pixels(saved(tmp_path, "dark.png", Image.fromarray(sixteen // 512)), sixteen // 512 / 257)
    assert_pixels(saved(tmp_path, "int.tif", Image.fromarray((RAMP * 2e9).astype(np.int32))), expected)
    assert_pixels(saved(tmp_path, "unit.tif", Image.fromarray(RAMP.astype(np.float32))), expected)
    assert_pixels(saved(tmp_path, "bytes.tif", Image.fromarray((RAMP * 255).astype(np.float32))), expected)
    signed = (RAMP * 8 - 4).astype(np.float32)
    signed[0, 0] = np.nan
    expected = RAMP * 255
    expected[0, 0] = 127.5
    assert_pixels(saved(tmp_path, "signed.tif", Image.fromarray(signed)), expected)


def test_other_modes(tmp_path):
    bits = Image.fromarray(np.where(RAMP > 0.5, 255, 0).astype(np.uint8)).convert("1")
    assert_pixels(saved(tmp_path, "bits.png", bits), np.where(RAMP > 0.5, 255, 0), 0)
    grey = Image.fromarray((RAMP * 255).round().astype(np.uint8))
    assert_pixels(saved(tmp_path, "grey.png", grey), RAMP * 255)
    cyan = Image.new("CMYK", (96, 80), (255, 0, 0, 0))
    assert_pixels(saved(tmp_path, "cmyk.tif", cyan), np.broadcast_to([0, 255, 255], (80, 96, 3)), 0)
    assert_pixels(saved(tmp_path, "cmyk.jpg", cyan, quality=100), np.broadcast_to([0, 255, 255], (80, 96, 3)), 4)
    lab = Image.merge("LAB", [Image.new("L", (96, 80), value) for value in (255, 128, 128)])
    assert_pixels(saved(tmp_path, "lab.tif", lab), np.full((80, 96), 255), 2)


def test_first_frame_of_animations(tmp_path):
    frames = [Image.new("RGB", (80, 70), color) for color in ("red", "blue")]
    for name, options in {"a.gif": {}, "a.webp": {"lossless": True}, "a.png": {}}.items():
        path = saved(tmp_path, name, frames[0], save_all=True, append_images=frames[1:], **options)
        assert_pixels(path, np.broadcast_to([255, 0, 0], (70, 80, 3)), 0)


def swapped_red_and_green():
    """sRGB's profile with its red and green primaries exchanged, so that its effect can't be overlooked."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, green = data.index(b"rXYZ"), data.index(b"gXYZ")
    data[red : red + 4], data[green : green + 4] = b"gXYZ", b"rXYZ"
    return bytes(data)


def test_color_profiles(tmp_path):
    solid = Image.new("RGB", (96, 80), (255, 0, 0))
    green = np.broadcast_to([0, 255, 0], (80, 96, 3))
    assert_pixels(saved(tmp_path, "profiled.png", solid, icc_profile=swapped_red_and_green()), green, 2)
    assert_pixels(saved(tmp_path, "alpha.png", solid.convert("RGBA"), icc_profile=swapped_red_and_green()), green, 2)
    for name, profile in {"broken": b"no profile at all", "cut": swapped_red_and_green()[:200]}.items():
        path = saved(tmp_path, f"{name}.png", solid, icc_profile=profile)
        assert_pixels(path, np.broadcast_to([255, 0, 0], (80, 96, 3)), 0)
    grey = Image.new("L", (96, 80), 77)
    assert_pixels(saved(tmp_path, "mismatch.png", grey, icc_profile=swapped_red_and_green()), np.full((80, 96), 77), 0)


def test_crop_is_the_middle_and_does_not_alias(tmp_path):
    crop = assign(1200, 600, 128)
    assert (crop.width, crop.height) == (192, 64)
    checkers = np.indices((600, 1200)).sum(0) % 2 * 255
    small = np.asarray(crop_picture(Image.fromarray(checkers.astype(np.uint8)).convert("RGB"), crop)).astype(float)
    assert small.shape == (64, 192, 3)
    assert np.abs(small - 127.5).max() < 12, "a fine checkerboard must turn grey, not into a moiré"
    ramp = np.tile(np.linspace(0, 255, 600)[:, None], (1, 1200)).astype(np.uint8)
    rows = np.asarray(crop_picture(Image.fromarray(ramp).convert("RGB"), crop))[:, 0, 0].astype(float)
    assert abs((rows[0] + rows[-1]) / 2 - 127.5) < 2, "the crop is not centred"


def test_to_tensor():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    tensor = to_tensor(Image.fromarray(pixels))
    assert tensor.shape == (3, 5, 7) and tensor.dtype == torch.float32
    expected = torch.tensor(pixels.astype(np.float64) / 255 * 2 - 1).permute(2, 0, 1)
    torch.testing.assert_close(tensor.double(), expected, atol=1e-6, rtol=0)


def test_what_went_wrong_since_the_scan_names_the_picture(tmp_path):
    path = saved(tmp_path, "gone.png", Image.new("RGB", (96, 80)))
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    with pytest.raises(CrumbError, match=r"gone\.png.*can't be decoded"):
        load_rgb(path)
    path.unlink()
    with pytest.raises(CrumbError, match=r"gone\.png.*can't be read"):
        load_rgb(path)
