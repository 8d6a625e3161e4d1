"""Sample pictures drawn as text: two pixels a cell, by the upper half block.

Apart from the view because it opens files and needs Pillow, which is loaded only here.
"""

import sys
from pathlib import Path

from rich.color import Color
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.style import Style
from rich.table import Table
from rich.text import Text

from crumb.wizard.dashboard.state import clean

SHEET_GAP = 6


def half_blocks(path: Path, width_cells: int, max_lines: int | None = None) -> Text:
    """The picture at most `width_cells` wide, half as many lines for a square; its path where it can't be read."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            if max_lines is not None:
                width_cells = min(width_cells, round(2 * max_lines * picture.width / picture.height))
            width_cells = max(1, width_cells)
            height = max(2, round(picture.height / picture.width * width_cells / 2) * 2)
            pixels = picture.convert("RGB").resize((width_cells, height), Image.Resampling.BOX).load()
    except (OSError, ValueError, Image.DecompressionBombError):
        return Text(clean(path))
    text = Text(no_wrap=True)
    for y in range(0, height, 2):
        for x in range(width_cells):
            text.append("▀", Style(color=Color.from_rgb(*pixels[x, y]), bgcolor=Color.from_rgb(*pixels[x, y + 1])))
        if y + 2 < height:
            text.append("\n")
    return text


def can_show_pictures(console: Console, ascii: bool = False) -> bool:
    """Sixteen colours and fewer show a picture that nobody recognises; then its path is the better answer."""
    return (not ascii and not console.no_color and console.color_system in ("256", "truecolor", "windows")
            and console.encoding.startswith("utf"))


def before_after(columns: list[tuple[str, Path, Path]], width: int, ascii: bool = False,
                 max_lines: int | None = None) -> RenderableType:
    """Columns of (label, picture before, picture after), or their paths where the console can't show pictures.

    max_lines: the height of each picture at most.
    """
    return _BeforeAfter(columns, width, ascii, max_lines)


class _BeforeAfter:
    """Chooses pictures or paths when it is printed, as only then the console is known."""

    def __init__(self, columns: list[tuple[str, Path, Path]], width: int, ascii: bool, max_lines: int | None):
        self.columns, self.width, self.ascii, self.max_lines = columns, width, ascii, max_lines

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if not can_show_pictures(console, self.ascii):
            for label, before, after in self.columns:
                yield Text(f"{clean(label)}\n  before: {clean(before)}\n  after:  {clean(after)}", no_wrap=True,
                           overflow="fold")
            return
        gaps = 2 * (len(self.columns) - 1)
        each = max(4, (min(self.width, options.max_width) - gaps) // len(self.columns))
        table = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
        table.add_row(*(Text(clean(label), style="bold") for label, _, _ in self.columns))
        table.add_row(*(half_blocks(before, each, self.max_lines) for _, before, _ in self.columns))
        table.add_row(*(half_blocks(after, each, self.max_lines) for _, _, after in self.columns))
        yield table


def save_before_after(columns: list[tuple[str, Path, Path]], path: Path) -> None:
    """The same as one PNG: before in the upper row, after in the lower, each prompt above its column."""
    from PIL import Image, ImageDraw

    pictures = [[_opened(before), _opened(after)] for _, before, after in columns]
    side = max(picture.width for pair in pictures for picture in pair)
    line = 20
    sheet = Image.new("RGB", (len(columns) * (side + SHEET_GAP) + SHEET_GAP, 2 * (side + SHEET_GAP) + line), "white")
    draw = ImageDraw.Draw(sheet)
    for column, ((label, _, _), pair) in enumerate(zip(columns, pictures)):
        left = SHEET_GAP + column * (side + SHEET_GAP)
        draw.text((left, 4), label, fill="black")
        for row, picture in enumerate(pair):
            sheet.paste(picture, (left, line + row * (side + SHEET_GAP)))
    sheet.save(path)


def graphics(path: Path, width_cells: int) -> RenderableType | None:
    """The picture by sixel or kitty's protocol, in its own pixels; None where the terminal has neither."""
    if not sys.stdout.isatty() or not sys.stdin.isatty():
        return None
    try:
        # The import asks the terminal what it can do.
        from textual_image.renderable import Image, SixelImage, TGPImage
    except (ImportError, OSError):
        return None
    return Image(path, width=width_cells) if Image in (SixelImage, TGPImage) else None


def _opened(path: Path):
    from PIL import Image

    with Image.open(path) as picture:
        return picture.convert("RGB")
