"""Draws labelled sheets of pictures: columns with a heading each, rows in blocks, a prompt over each block.

    heading
    prompt of the first block
               column   column   column
    label     [picture][picture][picture]
    label     [picture][picture][picture]
    prompt of the second block ...

Pictures of different sizes stand side by side as they are: none is cropped or stretched. Torch-free.
"""

import io
import math
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from crumb.engine.run.directory import write_atomic

LONGEST_SIDE = 512
"""Pixels of a picture in a sheet: larger ones are scaled down, all by the same factor."""

MAX_SHEET_PIXELS = 64_000_000
"""Pillow warns of a bomb from 89 million on, and browsers get slow long before."""

MIN_WIDTH = 480
MAX_TITLE_LINES = 2
GAP = 6
FRAME = 3
PAPER, INK, BLANK, MARK = "#e6e6e6", "black", "#cfcfcf", "#12702e"
"""The paper is grey, so that pictures on white show where they end."""

WIDE_FONTS = ("NotoSansCJK-Regular.ttc", "NotoSansCJKsc-Regular.otf", "wqy-microhei.ttc", "wqy-zenhei.ttc",
              "DroidSansFallbackFull.ttf", "/mnt/c/Windows/Fonts/msyh.ttc", "DejaVuSans.ttf")
"""Tried for letters that Pillow's own font lacks; the path is Windows' own, as WSL2 sees it."""
LAST_ASCII = 0x7E

Band = tuple[int, Callable[[Image.Image, int], None]]
"""A stripe across the sheet: its height, and what paints it from a given line on."""


@dataclass(frozen=True)
class Row:
    """Pictures of one row, None where there is none; `label` at their left, in lines; `marked` puts a frame around."""

    label: list[str]
    pictures: list[Image.Image | None]
    marked: bool = False


@dataclass(frozen=True)
class Block:
    """Rows under one title."""

    title: str
    rows: list[Row]


def sheet_scale(sizes: Iterable[tuple[int, int]], num_each: int = 1) -> float:
    """The factor, at most 1, for pictures of these sizes when the sheet holds `num_each` of every one."""
    sizes = list(sizes)
    longest = max(max(size) for size in sizes)
    area = sum(width * height for width, height in sizes) * num_each
    return min(1.0, LONGEST_SIDE / longest, math.sqrt(MAX_SHEET_PIXELS / area))


def shrunk(picture: Image.Image, scale: float) -> Image.Image:
    if scale == 1:
        return picture
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    return picture.resize(size, Image.Resampling.LANCZOS)


def draw_sheet(heading: str, columns: list[str], blocks: list[Block]) -> Image.Image:
    """The whole sheet; column headings are repeated over each block that has several rows."""
    rows = [row for block in blocks for row in block.rows]
    pictures = [picture for row in rows for picture in row.pictures if picture]
    size = min(36, max(14, max(max(picture.size) for picture in pictures) // 16))
    measure = font_for("", size)
    column_width = max(*(picture.width for picture in pictures), *(math.ceil(measure.getlength(text)) for text in columns))
    lefts = _lefts(rows, size, column_width, len(columns))
    width = max(MIN_WIDTH, lefts[-1])
    bands = _text(heading, size, width)
    for index, block in enumerate(blocks):
        bands += [_blank(GAP), *_text(block.title, size, width)]
        if index == 0 or len(block.rows) > 1:
            bands.append(_columns(columns, size, lefts, column_width))
        bands += [_row(row, size, lefts, column_width) for row in block.rows]
    sheet = Image.new("RGB", (width, sum(height for height, _ in bands) + GAP), PAPER)
    top = 0
    for height, paint in bands:
        paint(sheet, top)
        top += height
    return sheet


def save_sheet(sheet: Image.Image, path: Path) -> None:
    """As PNG, whole or not at all."""
    data = io.BytesIO()
    sheet.save(data, format="PNG")
    write_atomic(path, data.getvalue())


@lru_cache
def _font(size: int, ascii: bool):
    for name in () if ascii else WIDE_FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)


def font_for(text: str, size: int):
    """Pillow's own font, or one of this machine with the letters of other scripts."""
    return _font(size, all(ord(letter) <= LAST_ASCII for letter in text))


def wrapped(text: str, font, width: int, max_lines: int) -> list[str]:
    """The text in lines of at most `width` pixels, broken at blanks where there are; cut with ... after `max_lines`."""
    text, lines = " ".join(text.split()), []
    while text:
        count = max(1, bisect_right(range(1, len(text) + 1), width, key=lambda count: font.getlength(text[:count])))
        if len(lines) == max_lines - 1 and count < len(text):
            return [*lines, text[: max(1, count - 3)].rstrip() + "..."]
        blank = text.rfind(" ", 0, count + 1)
        if count < len(text) and blank > 0:
            count = blank
        lines.append(text[:count].rstrip())
        text = text[count:].lstrip()
    return lines


def _line_height(size: int) -> int:
    return math.ceil(size * 1.3)


def _lefts(rows: list[Row], size: int, column_width: int, num_columns: int) -> list[int]:
    """Where each column starts; the last number is where the next one would."""
    labels = [font_for(line, size).getlength(line) for row in rows for line in row.label]
    start = GAP + FRAME + (math.ceil(max(labels)) + 2 * GAP if labels else 0)
    return [start + index * (column_width + GAP) for index in range(num_columns + 1)]


def _text(text: str, size: int, width: int) -> list[Band]:
    font = font_for(text, size)
    lines = wrapped(text, font, width - 2 * GAP, MAX_TITLE_LINES)

    def paint(sheet: Image.Image, top: int) -> None:
        for index, line in enumerate(lines):
            ImageDraw.Draw(sheet).text((GAP, top + GAP + index * _line_height(size)), line, INK, font)

    return [(GAP + len(lines) * _line_height(size), paint)] if lines else []


def _blank(height: int) -> Band:
    return height, lambda sheet, top: None


def _columns(columns: list[str], size: int, lefts: list[int], column_width: int) -> Band:
    def paint(sheet: Image.Image, top: int) -> None:
        for left, text in zip(lefts, columns):
            ImageDraw.Draw(sheet).text((left + column_width / 2, top + GAP), text, INK, font_for(text, size), "ma")

    return GAP + _line_height(size), paint


def _row(row: Row, size: int, lefts: list[int], column_width: int) -> Band:
    height = max([len(row.label) * _line_height(size), *(picture.height for picture in row.pictures if picture)])

    def paint(sheet: Image.Image, top: int) -> None:
        draw, top = ImageDraw.Draw(sheet), top + GAP
        if row.marked:
            draw.rectangle((GAP - FRAME, top - FRAME, lefts[-1] - GAP + FRAME - 1, top + height + FRAME - 1), None, MARK, FRAME)
        for index, line in enumerate(row.label):
            colour = MARK if row.marked else INK
            draw.text((GAP + FRAME, top + index * _line_height(size)), line, colour, font_for(line, size))
        for left, picture in zip(lefts, row.pictures):
            if picture:
                sheet.paste(picture, (left + (column_width - picture.width) // 2, top))
            else:
                draw.rectangle((left, top, left + column_width - 1, top + height - 1), BLANK)

    return GAP + height, paint
