"""The grid of samples over time: every picture whole in its place, the middle thinned out, nothing half-written."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crumb.engine.sheet.over_time import draw_before_after, draw_over_time, thinned


def sample(folder: Path, step: int, index: int, size: tuple[int, int], colour: str) -> None:
    Image.new("RGB", size, colour).save(folder / f"step-{step:06d}-{index}.png")


def boxes(sheet: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int] | None:
    """The smallest box around all pixels of a colour."""
    return Image.fromarray((np.asarray(sheet) == colour).all(axis=2)).getbbox()


def test_pictures_of_any_size_are_whole_and_in_order(tmp_path):
    colours = {(0, 0): "#ff0000", (0, 1): "#00ff00", (50, 0): "#0000ff", (50, 1): "#ff00ff"}
    for (step, index), colour in colours.items():
        sample(tmp_path, step, index, (128, 192) if index == 0 else (192, 64), colour)
    path = draw_over_time(tmp_path, "ohwx", ["a cat --w 128 --h 192", "a dog"])
    assert path == tmp_path / "grid.png"
    with Image.open(path) as sheet:
        found = {place: boxes(sheet, tuple(bytes.fromhex(colour[1:]))) for place, colour in colours.items()}
    sizes = {place: (right - left, bottom - top) for place, (left, top, right, bottom) in found.items()}
    assert sizes == {(0, 0): (128, 192), (50, 0): (128, 192), (0, 1): (192, 64), (50, 1): (192, 64)}
    assert found[0, 0][2] < found[50, 0][0] and found[0, 0][1] == found[50, 0][1]
    assert found[0, 0][3] < found[0, 1][1] and found[0, 1][2] < found[50, 1][0]
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


def test_large_pictures_are_scaled_alike(tmp_path):
    sample(tmp_path, 0, 0, (1024, 512), "#ff0000")
    sample(tmp_path, 0, 1, (512, 512), "#0000ff")
    with Image.open(draw_over_time(tmp_path, "ohwx", ["a", "b"])) as sheet:
        (left, top, right, bottom), small = boxes(sheet, (255, 0, 0)), boxes(sheet, (0, 0, 255))
    assert (right - left, bottom - top) == (512, 256) and small[2] - small[0] == small[3] - small[1] == 256


@pytest.mark.parametrize("num", [1, 12, 13, 40, 1000])
def test_at_most_twelve_columns_with_first_and_last(num):
    steps = [step * 50 for step in range(num)]
    kept = thinned(steps)
    assert len(kept) == min(12, num) and kept[0] == 0 and kept[-1] == steps[-1] and kept == sorted(set(kept))


def test_missing_and_damaged_pictures_leave_a_gap(tmp_path):
    assert draw_over_time(tmp_path, "ohwx", ["a"]) is None
    sample(tmp_path, 0, 0, (64, 64), "#ff0000")
    (tmp_path / "step-000010-0.png").write_bytes(b"half a picture")
    sample(tmp_path, 10, 1, (64, 64), "#0000ff")
    sample(tmp_path, 10, 7, (64, 64), "#00ff00")  # of a prompt that the plan no longer has
    with Image.open(draw_over_time(tmp_path, "ohwx", ["a", "b"])) as sheet:
        assert boxes(sheet, (255, 0, 0)) and boxes(sheet, (0, 0, 255)) and not boxes(sheet, (0, 255, 0))


def test_before_and_after_needs_both(tmp_path):
    sample(tmp_path, 0, 0, (64, 64), "#ff0000")
    sample(tmp_path, 10, 0, (64, 64), "#00ff00")
    assert draw_before_after(tmp_path, "ohwx", ["a"], 20, tmp_path / "ohwx.png") is None
    sample(tmp_path, 20, 0, (64, 64), "#0000ff")
    with Image.open(draw_before_after(tmp_path, "ohwx", ["a"], 20, tmp_path / "ohwx.png")) as sheet:
        assert boxes(sheet, (255, 0, 0)) and boxes(sheet, (0, 0, 255)) and not boxes(sheet, (0, 255, 0))
