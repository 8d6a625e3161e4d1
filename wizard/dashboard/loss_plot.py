"""The loss curve as text: dots and a line in braille cells, with axes that carry real numbers.

A canvas of its own, as the two series need their own colours and the axes exact ticks; pure, so tests read it.
"""

import itertools
import math
from collections.abc import Sequence

from rich.text import Text

from crumb.wizard.dashboard.state import LossPoint

DOT_STYLE, LINE_STYLE, AXIS_STYLE = "bright_black", "bold cyan", "dim"

_BRAILLE_BITS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))


def loss_plot(points: Sequence[LossPoint], width: int, height: int, *, last_step: int = 0,
              ascii: bool = False) -> list[Text]:
    """`height` lines of at most `width` cells; the last two are the x axis and its steps.

    The y range is that of the smoothed curve with a margin; raw dots beyond it are left out and counted
    in the top line. last_step: where the x axis ends at least (points may have been thinned).
    """
    rows = max(1, height - 2)
    low, high = _value_range(points)
    y_ticks = _ticks(low, high, max(2, min(5, rows // 2)))
    labels = _tick_labels(y_ticks)
    gutter = max(len(label) for label in labels) + 2
    if width < 2 * gutter:
        labels, gutter = ["" for _ in labels], 1
    columns = max(1, width - gutter - 1)
    first, last = _step_range(points, last_step)
    cells = _draw(points, columns, rows, (first, last), (low, high), ascii)
    tick_rows = {_row(tick, low, high, rows): label for tick, label in zip(y_ticks, labels)}
    lines = []
    for row in range(rows):
        label = tick_rows.get(row) if points else None
        axis = ("|" if ascii else "┤" if label else "│")
        line = Text(no_wrap=True).append(f"{label or '':>{gutter - 1}} {axis}", AXIS_STYLE)
        for style, run in itertools.groupby(cells[row], key=lambda cell: cell[1]):
            line.append("".join(char for char, _ in run), style)
        lines.append(line)
    _note(lines[0], gutter + 1, columns, clipped_count(points, low, high), ascii)
    if not any(point.raw is not None for point in points):
        _centre(lines[rows // 2], gutter + 1, columns, "no step yet: the curve starts with the first one")
    return lines + _x_axis(first, last, gutter, columns, ascii)


def clipped_count(points: Sequence[LossPoint], low: float, high: float) -> tuple[int, int]:
    """How many raw losses lie (above, below) the range."""
    raw = [point.raw for point in points if point.raw is not None]
    return sum(value > high for value in raw), sum(value < low for value in raw)


def _value_range(points: Sequence[LossPoint]) -> tuple[float, float]:
    values = [point.smoothed for point in points if point.smoothed is not None]
    values = values or [point.raw for point in points if point.raw is not None]
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    # Half the range again on both sides lets most raw dots in; a flat curve gets a fifth of its height.
    margin = max(0.5 * (high - low), 0.2 * abs(high)) or 0.1
    return max(0.0, low - margin) if low >= 0 else low - margin, high + margin


def _step_range(points: Sequence[LossPoint], last_step: int) -> tuple[int, int]:
    first = points[0].step if points else 0
    last = max(points[-1].step if points else 0, last_step)
    return first, max(last, first + 1)


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers inside the range: 1, 2, 2.5 or 5 times a power of ten apart, at most `count` + 1 of them."""
    span = (high - low) or 1.0
    power = 10 ** math.floor(math.log10(span / count))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10, 20) if power * factor * count >= span * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)] or [low]


def _tick_labels(ticks: Sequence[float]) -> list[str]:
    """As few decimals as keep the labels exact; powers of ten where that would be long."""
    size = max(abs(tick) for tick in ticks)
    if size and not 1e-3 <= size < 1e6:
        return [f"{tick:.2e}" for tick in ticks]
    decimals = next((d for d in range(7) if all(abs(round(tick, d) - tick) < 1e-9 for tick in ticks)), 7)
    return [f"{tick:.{decimals}f}" for tick in ticks]


def _row(value: float, low: float, high: float, rows: int) -> int:
    return min(rows - 1, int((high - value) / (high - low) * rows))


def _draw(points, columns: int, rows: int, steps: tuple[int, int], values: tuple[float, float],
          ascii: bool) -> list[list[tuple[str, str]]]:
    """rows x columns of (character, style): the raw dots, and over them the smoothed line."""
    x_scale, y_scale = (1, 1) if ascii else (2, 4)
    num_x, num_y = columns * x_scale, rows * y_scale

    def place(step: int, value: float) -> tuple[int, int]:
        x = (step - steps[0]) / (steps[1] - steps[0]) * (num_x - 1)
        y = (values[1] - value) / (values[1] - values[0]) * num_y
        return round(x), min(num_y - 1, int(y))

    dots = {place(p.step, p.raw) for p in points if p.raw is not None and values[0] <= p.raw <= values[1]}
    line: set[tuple[int, int]] = set()
    before = None
    for point in points:
        if point.smoothed is None:
            before = None
            continue
        here = place(point.step, point.smoothed)
        line |= _segment(before or here, here)
        before = here
    if ascii:
        return [[("*", LINE_STYLE) if (x, y) in line else (".", DOT_STYLE) if (x, y) in dots else (" ", "")
                 for x in range(columns)] for y in range(rows)]
    line_cells, dot_cells = _braille(line), _braille(dots)
    return [[_braille_cell(line_cells.get((x, y), 0), dot_cells.get((x, y), 0)) for x in range(columns)]
            for y in range(rows)]


def _segment(start: tuple[int, int], end: tuple[int, int]) -> set[tuple[int, int]]:
    count = max(abs(end[0] - start[0]), abs(end[1] - start[1]), 1)
    return {(round(start[0] + (end[0] - start[0]) * i / count), round(start[1] + (end[1] - start[1]) * i / count))
            for i in range(count + 1)}


def _braille(pixels: set[tuple[int, int]]) -> dict[tuple[int, int], int]:
    cells: dict[tuple[int, int], int] = {}
    for x, y in pixels:
        cell = (x // 2, y // 4)
        cells[cell] = cells.get(cell, 0) | _BRAILLE_BITS[y % 4][x % 2]
    return cells


def _braille_cell(line_bits: int, dot_bits: int) -> tuple[str, str]:
    """A cell has one colour, so where the line passes the dots step back and it stays a clean line."""
    if line_bits:
        return chr(0x2800 + line_bits), LINE_STYLE
    return (chr(0x2800 + dot_bits), DOT_STYLE) if dot_bits else (" ", "")


def _note(line: Text, start: int, columns: int, clipped: tuple[int, int], ascii: bool) -> None:
    words = ", ".join(f"{count} {where}" for count, where in zip(clipped, ("above", "below")) if count)
    if words and len(words) < columns:
        _overwrite(line, start + columns - len(words) - 1, f" {words}", "yellow")


def _centre(line: Text, start: int, columns: int, words: str) -> None:
    if len(words) <= columns:
        _overwrite(line, start + (columns - len(words)) // 2, words, "dim")


def _overwrite(line: Text, at: int, words: str, style: str) -> None:
    head, rest = line[:at], line[at + len(words):]
    line.plain = ""
    line.spans = []
    for part in (head, Text(words, style=style), rest):
        line.append_text(part)


def _x_axis(first: int, last: int, gutter: int, columns: int, ascii: bool) -> list[Text]:
    corner, flat, mark = ("+", "-", "+") if ascii else ("└", "─", "┴")
    axis, labels = [flat] * columns, [" "] * columns
    end_of_label = -2
    for tick in _ticks(first, last, max(2, columns // 12)):
        if tick != int(tick):
            continue
        x, label = round((tick - first) / (last - first) * (columns - 1)), str(int(tick))
        start = min(max(0, x - len(label) // 2), columns - len(label))
        if start > end_of_label + 1:
            axis[x] = mark
            labels[start:start + len(label)] = label
            end_of_label = start + len(label)
    unit = " step"
    if end_of_label + len(unit) < columns:
        labels[end_of_label:end_of_label + len(unit)] = unit
    return [Text(" " * gutter + corner + "".join(axis), style=AXIS_STYLE, no_wrap=True),
            Text(" " * (gutter + 1) + "".join(labels), style=AXIS_STYLE, no_wrap=True)]
