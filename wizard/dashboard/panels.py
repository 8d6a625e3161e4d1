"""The blocks of the dashboard, each a list of lines: numbers, GPU, latest events, result, what happened.

Apart from the layout, which only decides how many lines each block gets and where it stands.
"""

import time
from dataclasses import dataclass

from rich.cells import chop_cells
from rich.console import Console
from rich.text import Text

from crumb.wizard.dashboard.figures import clock, counted, figure, file_size, gib, percent, rate
from crumb.wizard.dashboard.loss_plot import DOT_STYLE, LINE_STYLE
from crumb.wizard.dashboard.state import DashboardState, Remark, clean

VERDICT_STYLES = {"learning": "green", "fitted": "green", "overfitting": "yellow", "not learning": "yellow",
                  "falling apart": "bold red"}
REMARK_STYLES = {"plain": "", "good": "green", "warning": "yellow", "error": "bold red"}


@dataclass(frozen=True)
class RunFacts:
    """What the view can't learn from events: read from the run folder by whoever hosts it."""

    result_path: str = ""
    result_bytes: int | None = None
    trigger: str = ""
    vram_gib: float | None = None
    """The VRAM that the plan was made for."""


def numbers_narrow(state: DashboardState, width: int) -> list[Text]:
    """Two lines, and a third once something was measured on fixed noise."""
    loss, rest = Text(" "), Text(" ")
    loss.append("loss ", "dim").append(figure(state.smoothed_loss), "bold")
    loss.append(f"  last {figure(state.last_loss)}  best {figure(state.best_loss)}")
    loss.append("   lr ", "dim").append(rate(state.learning_rate))
    if width >= 78:
        loss.append("   grad norm ", "dim").append(figure(state.grad_norm, 3))
    rest.append("speed ", "dim").append(_speed(state), "bold").append(f"  {_images(state)}")
    rest.append("   data wait ", "dim").append(percent(state.data_wait_share))
    if state.num_skipped:
        rest.append(f"   {counted(state.num_skipped, 'step')} dropped", "yellow")
    return [loss, rest, *judged_narrow(state)]


def numbers_wide(state: DashboardState) -> list[Text]:
    """One line for each number, label first."""
    lines = [
        pair("loss", f"{figure(state.smoothed_loss)} smoothed", "bold"),
        pair("  last", figure(state.last_loss)),
        pair("  best", f"{figure(state.best_loss)} smoothed"),
        pair("lr", rate(state.learning_rate)),
        pair("grad norm", figure(state.grad_norm, 3)),
        pair("speed", _speed(state), "bold"),
        pair("", _images(state)),
        pair("data wait", percent(state.data_wait_share)),
    ]
    if state.num_skipped:
        lines.append(pair("dropped", f"{counted(state.num_skipped, 'step')} (not a number)", "yellow"))
    return lines + judged_wide(state)


def judged_narrow(state: DashboardState) -> list[Text]:
    """Losses on fixed noise, first -> last, and the verdict in a word."""
    if not state.judged:
        return []
    first, last = state.judged[0], state.judged[-1]
    line = Text(" ", no_wrap=True).append("fixed noise ", "dim").append(_fall(first.training, last.training))
    if last.held_out is not None:
        line.append("   held-out ", "dim").append(_fall(first.held_out, last.held_out), "bold")
    if state.verdict:
        line.append("   ").append(state.verdict, VERDICT_STYLES.get(state.verdict, ""))
    return [line]


def judged_wide(state: DashboardState) -> list[Text]:
    if not state.judged:
        return []
    first, last = state.judged[0], state.judged[-1]
    lines = [pair("fixed noise", _fall(first.training, last.training))]
    if last.held_out is not None:
        lines.append(pair("held-out", _fall(first.held_out, last.held_out), "bold"))
    return [*lines, pair("verdict", state.verdict, VERDICT_STYLES.get(state.verdict, ""))] if state.verdict else lines


def _fall(first: float | None, last: float) -> str:
    return f"{figure(first)} > {figure(last)}"


def gpu_narrow(state: DashboardState, facts: RunFacts) -> list[Text]:
    """Two lines."""
    name, placement = device_name(state), _placement(state)
    peak = f"{gib(state.vram_allocated_bytes)} now, peak {gib(state.vram_peak_bytes)}{_of_total(facts)}"
    return [pair("device", f"{name}, {placement}" if placement else name),
            pair("VRAM", peak if state.vram_peak_bytes else "n/a")]


def gpu_wide(state: DashboardState, facts: RunFacts) -> list[Text]:
    lines = [pair("device", device_name(state))]
    if _placement(state):
        lines.append(pair("placement", _placement(state)))
    if not state.vram_peak_bytes:
        return [*lines, pair("VRAM", "n/a")]
    return [*lines, pair("VRAM", f"{gib(state.vram_allocated_bytes)} now"),
            pair("", f"{gib(state.vram_peak_bytes)} peak{_of_total(facts)}")]


def device_name(state: DashboardState) -> str:
    return "CPU" if state.device == "cpu" else state.device or "n/a"


def _placement(state: DashboardState) -> str:
    return clean(state.numbers.get("placement") or "")


def _of_total(facts: RunFacts) -> str:
    return f" of {facts.vram_gib:g} GiB" if facts.vram_gib else ""


def result_lines(state: DashboardState, name: str, width: int, now: float, facts: RunFacts, ascii: bool) -> list[Text]:
    """What came out and how to use it."""
    size = f"  ({file_size(facts.result_bytes)})" if facts.result_bytes is not None else ""
    lines = [rule("result", width, ascii)]
    lines += path_lines("file", facts.result_path or state.result or "n/a", size, width)
    lines += [pair("trigger", clean(facts.trigger))] if facts.trigger else []
    lines.append(pair("took", f"{clock(state.elapsed_s(now))}, peak VRAM {gib(state.vram_peak_bytes)}, "
                              f"loss {figure(state.smoothed_loss)} smoothed (best {figure(state.best_loss)})"))
    lines += verdict_lines(state, width)
    if state.num_warnings or state.num_skipped:
        lines.append(pair("notes", f"{counted(state.num_warnings, 'warning')}, "
                                   f"{counted(state.num_skipped, 'step')} dropped", "yellow"))
    if state.warnings:
        lines.append(pair("", state.warnings[-1], "yellow"))
    if state.samples and state.samples[-1][1]:
        lines.append(pair("samples", state.samples[-1][1][0]))
    return [*lines, rule("how to use it", width, ascii),
            pair("ComfyUI", "copy it to models/loras, add a Load LoRA node"),
            pair("A1111/Forge", f"copy it to models/Lora, write <lora:{clean(name)}:1> in the prompt")]


def verdict_lines(state: DashboardState, width: int) -> list[Text]:
    """What the losses on fixed noise say of the run, what it rests on, and what to do about it."""
    if not state.verdict_basis:
        return []
    word = f"{state.verdict}: " if state.verdict else ""
    wrapped = Text(f"{word}{state.verdict_basis}. {state.remedy}".strip()).wrap(Console(width=width), max(10, width - 14))
    lines = [pair("verdict" if number == 0 else "", line.plain) for number, line in enumerate(wrapped)]
    lines[0].highlight_words([state.verdict] if state.verdict else [], VERDICT_STYLES.get(state.verdict, ""))
    return lines


def trouble_lines(state: DashboardState, words: str, name: str, width: int, ascii: bool) -> list[Text]:
    """Why the run is not going on, and what to do now; empty while it goes on."""
    saved = f"The last save is {state.saved[-1][1]}." if state.saved else "Nothing was saved yet."
    if words == "process gone":
        text = f"The engine ended without a word: killed, or the machine went down. {saved}"
    elif words.startswith("failed"):
        text = f"{words} {saved}"
    elif words.startswith("stopped"):
        text = f"Stopped on request. {saved}"
    else:
        return []
    style = "yellow" if words.startswith("stopped") else "bold red"
    wrapped = Text(text, style=style).wrap(Console(width=width), width - 2)
    return [rule("what happened", width, ascii), *(Text(" ").append_text(line) for line in wrapped),
            Text(f" Go on with: crumb resume {clean(name)}      Full log: engine.log in the run folder")]


def remark_lines(state: DashboardState, count: int) -> list[Text]:
    """The newest `count` events in words."""
    newest = list(state.remarks)[-count:]
    return [_remark_line(remark) for remark in newest] or [Text(" nothing yet", style="dim")]


def _remark_line(remark: Remark) -> Text:
    line = Text(" ", no_wrap=True).append(time.strftime("%H:%M:%S", time.localtime(remark.time)), "dim")
    return line.append("  ").append(remark.words, REMARK_STYLES.get(remark.kind, ""))


def loss_title(width: int, ascii: bool) -> Text:
    line, dot = ("*", ".") if ascii else ("━", "⠂")
    title = rule("loss", width, ascii)
    legend = Text(" ").append(line, LINE_STYLE).append(" smoothed  ").append(dot, DOT_STYLE).append(" each step ")
    title.truncate(width - legend.cell_len - 2)
    return title.append_text(legend).append("-- " if ascii else "──", "dim")


def rule(title: str, width: int, ascii: bool) -> Text:
    flat = "-" if ascii else "─"
    line = Text(no_wrap=True).append(f"{flat}{flat} ", "dim").append(title, "bold").append(" ")
    return line.append(flat * max(0, width - line.cell_len), "dim")


def pair(label: str, value: str, style: str = "") -> Text:
    return Text(" ", no_wrap=True).append(f"{label:<12}", "dim").append(value, style)


def path_lines(label: str, path: str, size: str, width: int) -> list[Text]:
    """A path is there to be copied, so it is folded rather than cut."""
    line = pair(label, path, "bold green").append(size)
    if line.cell_len <= width:
        return [line]
    rows = [Text(f" {part}", style="bold green") for part in chop_cells(path, width - 2)]
    return [pair(label, size.strip()), *rows]


def _speed(state: DashboardState) -> str:
    seconds = state.seconds_per_step
    return "n/a" if seconds is None else f"{seconds:.2f} s/step"


def _images(state: DashboardState) -> str:
    return "images/s n/a" if state.images_per_s is None else f"{state.images_per_s:.2f} images/s"
