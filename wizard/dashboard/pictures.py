"""Sample pictures drawn as text: two pixels a cell, by the upper half block.

Apart from the view because it opens files and needs Pillow, which is loaded only here.
"""

from pathlib import Path

from rich.color import Color
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.style import Style
from rich.table import Table
from rich.text import Text

from crumb.wizard.dashboard.state import clean


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


def before_after(before: Path, after: Path, width: int, ascii: bool = False) -> RenderableType:
    """Two pictures side by side in `width` cells, or their paths where the console can't show them."""
    return _BeforeAfter(before, after, width, ascii)


class _BeforeAfter:
    """Chooses pictures or paths when it is printed, as only then the console is known."""

    def __init__(self, before: Path, after: Path, width: int, ascii: bool):
        self.before, self.after, self.width, self.ascii = before, after, width, ascii

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if not can_show_pictures(console, self.ascii):
            yield Text(f"before: {clean(self.before)}", no_wrap=True, overflow="fold")
            yield Text(f"after:  {clean(self.after)}", no_wrap=True, overflow="fold")
            return
        each = max(4, (min(self.width, options.max_width) - 2) // 2)
        table = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
        table.add_row(Text("before", style="bold"), Text("after", style="bold"))
        table.add_row(half_blocks(self.before, each), half_blocks(self.after, each))
        yield table
