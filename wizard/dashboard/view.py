"""The dashboard as a pure function: state in, lines of text out, fitted to the cell.

Whatever hosts it (rich.live, a Textual screen, a test) gets the same text. Every colour has a word beside it.
"""

import math
import re
import time

from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.text import Text

from crumb.wizard.dashboard.figures import clock, time_of_day
from crumb.wizard.dashboard.health import health, phase_words
from crumb.wizard.dashboard.loss_plot import loss_plot
from crumb.wizard.dashboard.panels import (
    RunFacts,
    gpu_narrow,
    gpu_wide,
    loss_title,
    numbers_narrow,
    numbers_wide,
    remark_lines,
    result_lines,
    rule,
    trouble_lines,
)
from crumb.wizard.dashboard.state import WHILE_TRAINING, DashboardState, clean

KEYS = "q leave, training goes on   p pictures now   s save now   x stop"
WIDE = 100
SIDE_COLUMN = 38


def render(state: DashboardState, run_state: dict, run_name: str, width: int, height: int, ascii: bool = False, *,
           now: float | None = None, facts: RunFacts | None = None, keys: str = KEYS,
           picture: Text | None = None) -> RenderableType:
    """At most `height` lines, none wider than `width` cells.

    now: unix seconds. keys: the last line (a question or an answer may stand there); empty = none.
    picture: the newest sample as text, shown where the screen is wide.
    """
    now = time.time() if now is None else now
    facts = facts or RunFacts()
    words = health(state, run_state, now, run_name)
    top = [_head(state, run_state, run_name, words, width), _bar(state, words, width, now, ascii)]
    bottom = [_key_line(keys, width)] if keys else []
    room = max(0, height - len(top) - len(bottom))
    trouble = trouble_lines(state, words, run_name, width, ascii)[:room]
    if words == "finished":
        middle = _middle_finished(state, run_name, width, room, now, facts, ascii)
    elif not state.points:
        middle = [*trouble, rule("latest", width, ascii), *remark_lines(state, max(1, room - len(trouble) - 1))]
    elif width >= WIDE:
        middle = trouble + _middle_wide(state, width, room - len(trouble), facts, ascii, picture)
    else:
        middle = trouble + _middle_narrow(state, width, room - len(trouble), facts, ascii)
    middle = middle[:room]
    if bottom:
        middle += [Text("")] * (room - len(middle))
    return Group(*(_fit(line, width, ascii) for line in (top + middle + bottom)[:height]))


def _head(state: DashboardState, run_state: dict, name: str, words: str, width: int) -> Text:
    """Name, phase, step and epoch on the left, the verdict on the right."""
    doing, verdict = phase_words(state, run_state), re.split(r":| \(", words)[0]
    style = {"running": "green", "finished": "bold green", "failed": "bold red", "process gone": "bold red"}.get(
        verdict, "bold yellow")
    line = Text(" ", no_wrap=True).append(clean(name), "bold")
    line.append("   ").append(doing, "bold cyan" if verdict == "running" else style)
    step, steps = state.step or run_state.get("step") or 0, state.steps or run_state.get("steps") or 0
    if steps:
        line.append(f"   step {step}/{steps}")
    if state.epoch is not None:
        per_epoch = state.numbers.get("steps_per_epoch")
        line.append(f"   epoch {state.epoch}" + (f"/{math.ceil(steps / per_epoch)}" if per_epoch and steps else ""))
    if verdict in (doing, f"{doing} at step {step}"):
        return line
    left = width - cell_len(line.plain) - cell_len(verdict) - 1
    if left < 2:
        # The verdict outranks the rest: it is what a person must act upon.
        line.truncate(max(1, width - cell_len(verdict) - 3), overflow="crop")
        left = 2
    return line.append(" " * left).append(verdict, style)


def _bar(state: DashboardState, words: str, width: int, now: float, ascii: bool) -> Text:
    training = state.phase in WHILE_TRAINING or not state.progress
    done, total = (state.step, state.steps) if training else state.progress
    share = min(1.0, done / total) if total else 0.0
    parts = [f"{share:4.0%}" if training else f"{done}/{total}", f"{clock(state.elapsed_s(now))} elapsed"]
    remaining = state.remaining_s(now)
    if words == "running" and remaining is not None:
        parts.append(f"{clock(remaining)} left")
        if training:
            parts.append(f"ends {time_of_day(now + remaining, now)}")
    elif words == "running":
        parts.append("left n/a")
    tail = "  ".join(parts)
    cells = max(4, width - cell_len(tail) - 4)
    full = round(share * cells)
    on, off = ("#", "-") if ascii else ("━", "─")
    return Text(" ", no_wrap=True).append(on * full, "green").append(off * (cells - full), "dim").append(f"  {tail}")


def _key_line(keys: str, width: int) -> Text:
    return Text(f" {keys}" + " " * max(0, width - cell_len(keys) - 1), style="reverse", no_wrap=True)


def _middle_narrow(state: DashboardState, width: int, room: int, facts: RunFacts, ascii: bool) -> list[Text]:
    numbers, gpu = numbers_narrow(state, width), gpu_narrow(state, facts)
    num_remarks = 3 if room >= 17 else 1
    spare = room - len(numbers) - len(gpu) - num_remarks - 3
    lines = []
    if spare >= 5:
        lines += [loss_title(width, ascii)]
        lines += loss_plot(state.points, width - 1, spare, last_step=state.step, ascii=ascii)
    lines += [rule("numbers", width, ascii), *numbers, *gpu]
    return [*lines, rule("latest", width, ascii), *remark_lines(state, num_remarks)]


def _middle_wide(state: DashboardState, width: int, room: int, facts: RunFacts, ascii: bool,
                 picture: Text | None) -> list[Text]:
    num_remarks = 5 if room >= 30 else 3
    plot_width, plot_height = width - SIDE_COLUMN - 2, room - num_remarks - 2
    side = [rule("numbers", SIDE_COLUMN, ascii), *numbers_wide(state),
            rule("device", SIDE_COLUMN, ascii), *gpu_wide(state, facts)]
    rows = list(picture.split("\n")) if picture is not None else []
    if rows and len(side) + len(rows) <= plot_height:
        side += [rule(f"sample of step {state.samples[-1][0]}" if state.samples else "sample", SIDE_COLUMN, ascii),
                 *(Text(" ").append_text(row) for row in rows)]
    left = []
    if plot_height >= 6:
        left = [loss_title(plot_width, ascii),
                *loss_plot(state.points, plot_width - 1, plot_height, last_step=state.step, ascii=ascii)]
    return [*_beside(left, side, plot_width, max(0, plot_height + 1), ascii),
            rule("latest", width, ascii), *remark_lines(state, num_remarks)]


def _middle_finished(state: DashboardState, name: str, width: int, room: int, now: float, facts: RunFacts,
                     ascii: bool) -> list[Text]:
    lines = result_lines(state, name, width, now, facts, ascii)
    spare = room - len(lines) - 1
    if spare < 6 or not state.points:
        return lines
    plot = loss_plot(state.points, width - 1, min(spare, 14), last_step=state.step, ascii=ascii)
    return [loss_title(width, ascii), *plot, *lines]


def _beside(left: list[Text], right: list[Text], left_width: int, height: int, ascii: bool) -> list[Text]:
    lines = []
    for row in range(height):
        line = left[row].copy() if row < len(left) else Text("")
        line = _fit(line, left_width, ascii)
        line.append(" " * (left_width - line.cell_len + 2))
        lines.append(line.append_text(right[row]) if row < len(right) else line)
    return lines


def _fit(line: Text, width: int, ascii: bool) -> Text:
    line.no_wrap = True
    if line.cell_len > width:
        line.truncate(width, overflow="crop" if ascii else "ellipsis")
    return line
