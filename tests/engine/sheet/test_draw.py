"""Labelled sheets: titles that fit, sheets that stay openable, the marked row framed."""

import warnings

import numpy as np
import pytest
from PIL import Image

from crumb.engine.sheet.draw import MAX_SHEET_PIXELS, Block, Row, draw_sheet, font_for, save_sheet, sheet_scale, shrunk, wrapped


@pytest.mark.parametrize("text", ["a red apple on a table", "word" * 60, "很长的提示词" * 20, "a  b\n\tc", "x"])
def test_wrapped_lines_fit_and_lose_no_word(text):
    font = font_for(text, 14)
    lines = wrapped(text, font, 100, 99)
    assert all(font.getlength(line) <= 100 for line in lines)
    assert "".join("".join(lines).split()) == "".join(text.split())
    cut = wrapped(text, font, 100, 1)
    assert len(cut) == 1 and cut[0].endswith("...") == (len(lines) > 1)


def test_nothing_is_enlarged_and_a_huge_sheet_stays_openable(tmp_path):
    assert sheet_scale([(128, 128)], 30) == 1
    assert sheet_scale([(1024, 512), (512, 512)], 4) == 0.5
    scale = sheet_scale([(1024, 1024)] * 4, 50 * 6)
    cells = [Row(["step"], [shrunk(Image.new("RGB", (1024, 1024)), scale)] * 6)] * 50
    sheet = draw_sheet("ohwx", list("abcdef"), [Block("a cat", cells)] * 4)
    assert 4 * 50 * 6 * (round(1024 * scale)) ** 2 < MAX_SHEET_PIXELS * 1.02
    save_sheet(sheet, tmp_path / "sheet.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Image.open(tmp_path / "sheet.png").close()
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]


def test_the_best_row_is_framed_and_labels_touch_no_picture():
    red = Image.new("RGB", (64, 64), "#ff0000")
    label = ["step 100000 (final)", "held-out loss 0.1234", "best"]
    rows = [Row(label, [red, None]), Row(label, [red, red], marked=True)]
    plain = np.asarray(draw_sheet("", ["base", "1.0"], [Block("a cat", [rows[0], Row(label, [red, red])])]))
    framed = np.asarray(draw_sheet("", ["base", "1.0"], [Block("a cat", rows)]))
    assert plain.shape == framed.shape
    is_red = (framed == (255, 0, 0)).all(axis=2)
    assert is_red.sum() == 3 * 64 * 64 and ((plain == (255, 0, 0)).all(axis=2) == is_red).all()
    changed = np.argwhere((plain != framed).any(axis=2))
    top_of_second = np.argwhere(is_red)[:, 0].max() - 63
    assert len(changed) and changed[:, 0].min() >= top_of_second - 3
