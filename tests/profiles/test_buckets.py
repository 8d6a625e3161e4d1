"""Buckets and crops: what must hold for every picture, and a few sizes worked out by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crumb.profiles.buckets import Crop, assign, bucket_sizes, steps_per_epoch

SIDES = st.integers(64, 9000)
RESOLUTIONS = st.sampled_from([128, 512, 768, 832, 1024])


def test_bucket_sizes_are_those_of_sd_scripts():
    """Compared with its `make_bucket_resolutions((1024, 1024), 512, 2048, 64)`, written out anew."""
    expected = {(1024, 1024)}
    for width in range(512, 2049, 64):
        height = min(2048, 1024 * 1024 // width // 64 * 64)
        if height >= 512:
            expected |= {(width, height), (height, width)}
    assert bucket_sizes(1024) == sorted(expected)
    assert bucket_sizes(128) == [(64, 192), (64, 256), (128, 128), (192, 64), (256, 64)]


@given(SIDES, SIDES, RESOLUTIONS, st.booleans(), st.booleans())
def test_every_crop_lies_in_its_picture(width, height, resolution, buckets, upscale):
    crop = assign(width, height, resolution, buckets=buckets, upscale=upscale)
    assert crop.width % 64 == crop.height % 64 == 0 and min(crop.width, crop.height) >= 64, crop
    assert crop.width * crop.height <= resolution**2, crop
    assert crop.left >= 0 and crop.left + crop.width <= crop.resized_width, crop
    assert crop.top >= 0 and crop.top + crop.height <= crop.resized_height, crop
    assert crop.width == crop.resized_width or crop.height == crop.resized_height, f"more cut than needed: {crop}"
    assert buckets or crop.width == crop.height, crop
    if not upscale:
        assert crop.resized_width <= width and crop.resized_height <= height, f"enlarged: {crop}"


@given(st.floats(math.log(0.5), math.log(2)), st.floats(1.0, 6.0))
def test_ordinary_pictures_lose_little(log_aspect, scale):
    """Aspects from 1:2 to 2:1 with at least as many pixels as the bucket."""
    width = math.ceil(1024 * scale * math.exp(log_aspect / 2))
    height = math.ceil(1024 * scale * math.exp(-log_aspect / 2))
    crop = assign(width, height, 1024)
    assert crop.cropped_share <= 0.085, f"{width} x {height} loses {crop.cropped_share:.1%}: {crop}"
    distortion = (crop.resized_width / width) / (crop.resized_height / height)
    assert abs(distortion - 1) < 2 / min(crop.width, crop.height), f"stretched by {distortion}: {crop}"


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((4000, 3000), Crop(1152, 896, 1195, 896, 21, 0)),
        ((1050, 1080), Crop(1024, 1024, 1024, 1053, 0, 14)),  # sd-scripts trains this one at 960 x 960
        ((1000, 700), Crop(960, 640, 960, 672, 0, 16)),
        ((70, 4000), Crop(64, 2048, 64, 3657, 0, 804)),
    ],
)
def test_known_sizes(size, expected):
    assert assign(*size, 1024) == expected


def test_small_pictures_are_enlarged_only_when_asked():
    assert assign(300, 200, 1024, upscale=True) == Crop(1216, 832, 1248, 832, 16, 0)
    assert assign(300, 200, 1024, buckets=False) == Crop(192, 192, 288, 192, 48, 0)
    assert assign(300, 200, 1024, buckets=False, upscale=True) == Crop(1024, 1024, 1536, 1024, 256, 0)
    assert assign(40, 300, 1024) == Crop(64, 256, 64, 480, 0, 112)


def test_steps_per_epoch_rounds_up_within_each_bucket():
    assert steps_per_epoch({(1024, 1024): 5, (832, 1216): 4, (1216, 832): 1}, batch_size=4) == 2 + 1 + 1
    assert steps_per_epoch({}, 4) == 0
