import io
import re

import pytest
from PIL import Image
from rich.cells import cell_len
from rich.console import Console

from crumb.wizard.dashboard.panels import RunFacts
from crumb.wizard.dashboard.pictures import before_after, half_blocks
from crumb.wizard.dashboard.state import DashboardState, fold
from crumb.wizard.dashboard.view import render

NOW = 1_700_000_700.0
RUNNING = {"state": "training", "heartbeat": NOW - 1}
FACTS = RunFacts("/home/me/runs/小猫/小猫.safetensors", 88 * 2**20, "sks cat", 8.0)


def history(num_steps: int) -> DashboardState:
    state, start = DashboardState(), NOW - 700
    fold(state, [
        {"time": start, "type": "started", "device": "NVIDIA GeForce RTX 3060", "step": 0, "steps": 1200},
        {"time": start, "type": "numbers", "num_pictures": 24, "num_buckets": 5, "steps_per_epoch": 120,
         "placement": "NF4 base, recomputed"},
        {"time": start, "type": "phase", "phase": "train"},
        *({"time": NOW - 5 - 2.0 * (num_steps - i), "type": "step", "step": i,
           "epoch": 1 + (i - 1) // 120, "loss": 0.2 - i * 1e-4,
           "loss_smoothed": 0.2 - i * 1e-4, "learning_rate": 1e-4, "grad_norm": 0.31, "seconds": 2.0,
           "images_per_s": 0.5, "data_wait_s": 0.04, "vram_allocated_bytes": 3 * 2**30,
           "vram_peak_bytes": int(3.4 * 2**30)} for i in range(1, num_steps + 1)),
        {"time": NOW - 5, "type": "sample", "step": 300, "paths": ["samples/小猫.png"]},
        {"time": NOW - 4, "type": "warning", "text": "3 pictures are smaller than their bucket " * 5},
    ])
    return state


def show(state, width, height, run_state=RUNNING, *, color=None, **more) -> str:
    console = Console(width=width, height=height, file=io.StringIO(), force_terminal=color is not None,
                      color_system=color, legacy_windows=False)
    console.print(render(state, run_state, "小猫", width, height, now=NOW, facts=FACTS, **more))
    text = console.file.getvalue()
    lines = re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()
    assert len(lines) <= height, f"{len(lines)} lines at {width}x{height}"
    assert all(cell_len(line) <= width for line in lines), [line for line in lines if cell_len(line) > width]
    assert color is not None or "\x1b" not in text
    return "\n".join(lines)


@pytest.mark.parametrize("size", [(80, 24), (100, 30), (140, 40)])
def test_a_running_run_shows_everything_with_and_without_colour(size):
    state = history(340)
    text = show(state, *size)
    assert text == show(state, *size, color="truecolor") == show(state, *size, color="standard")
    for words in ("小猫   training   step 340/1200   epoch 3/10", "running", "28%", "11:40 elapsed", "28:40 left", "ends ",
                  "smoothed", "each step", "0.1660", "1.00e-4", "0.310", "2.00 s/step", "0.50 images/s", "2%",
                  "NVIDIA GeForce RTX 3060", "NF4 base, recomputed", "3.00 GiB", "3.40 GiB", "8 GiB",
                  "samples/小猫.png", "warning: 3 pictures", "q leave", "x stop"):
        assert words in text, f"{words!r} is missing at {size}:\n{text}"
    assert len(text.splitlines()) == size[1] and "x stop" in text.splitlines()[-1]
    ascii_text = show(state, *size, ascii=True)
    assert ascii_text.replace("小猫", "").isascii() and "***" in ascii_text and "1.00e-4" in ascii_text


@pytest.mark.parametrize("size", [(60, 16), (40, 10), (20, 5), (8, 2), (200, 12), (79, 60)])
@pytest.mark.parametrize("num_steps", [0, 1, 340])
def test_odd_screens_never_overflow(size, num_steps):
    for run_state in (RUNNING, {"state": "lost"}, {"state": "new"}):
        show(history(num_steps), *size, run_state)


def test_numbers_that_nobody_told_are_not_invented():
    state = DashboardState()
    fold(state, [{"time": NOW, "type": "started", "device": "cpu", "step": 0, "steps": 5},
                 {"time": NOW, "type": "step", "step": 1, "loss": 0.1}])
    text = show(state, 80, 24)
    assert "CPU" in text and "left n/a" in text
    assert re.search(r"VRAM +n/a", text) and "lr n/a" in text and "grad norm n/a" in text


def test_the_end_says_where_the_file_is_and_how_to_use_it():
    state = history(1200)
    fold(state, [{"time": NOW, "type": "finished", "step": 1200, "path": "小猫.safetensors", "vram_peak_bytes": 2**32}])
    text = show(state, 80, 24, {"state": "finished"}, keys="")
    for words in ("finished", FACTS.result_path, "88.0 MiB", "sks cat", "11:40", "peak VRAM 4.00 GiB", "models/loras",
                  "models/Lora,", "<lora:小猫:1>"):
        assert words in text, text
    narrow = show(state, 30, 24, {"state": "finished"}, keys="")
    assert FACTS.result_path in "".join(line.strip() for line in narrow.splitlines()), "a path is folded, never cut"


@pytest.mark.parametrize("size", [(80, 24), (100, 30), (140, 40)])
def test_losses_on_fixed_noise_and_the_verdict_are_told(size):
    state = history(1200)
    judged = {"time": NOW - 3, "type": "judged", "step": 0, "training_loss": 0.2, "held_out_loss": 0.21, "word": ""}
    fold(state, [judged, judged | {"step": 300, "training_loss": 0.15, "held_out_loss": 0.1902, "word": "overfitting",
                                   "best": True, "remedy": "Take the file of step 300.", "basis": "held-out 0.21 -> 0.19"}])
    text = show(state, *size)
    for words in ("0.2000 > 0.1500", "0.2100 > 0.1902", "overfitting"):
        assert words in text, text
    fold(state, [{"time": NOW, "type": "finished", "step": 1200, "path": "小猫.safetensors"}])
    text = show(state, *size, {"state": "finished"}, keys="")
    assert "verdict" in text and "overfitting: held-out 0.21 -> 0.19." in text and "Take the file of step 300." in text
    fold(state, [{"time": NOW, "type": "started", "step": 250, "steps": 1200}])
    assert [point.step for point in state.judged] == [0], "a resumed run measures again"


def test_a_run_that_ended_badly_says_why_and_how_to_go_on():
    state = history(340)
    fold(state, [{"time": NOW, "type": "error", "text": "No space left on /data. " * 6 + "and all of it"}])
    text = show(state, 80, 24, {"state": "failed"})
    assert "failed" in text.splitlines()[0] and "and all of it" in text
    assert "crumb resume 小猫" in text and "engine.log" in text
    assert "process gone" in show(history(3), 80, 24, {"state": "lost"}).splitlines()[0]


def test_pictures_have_the_right_colours_and_give_way_to_their_path(tmp_path):
    Image.new("RGB", (64, 64), (255, 0, 0)).save(tmp_path / "a.png")
    text = half_blocks(tmp_path / "a.png", 10)
    assert text.plain.split("\n") == ["▀" * 10] * 5
    assert all(span.style.color.triplet == span.style.bgcolor.triplet == (255, 0, 0) for span in text.spans)
    assert half_blocks(tmp_path / "a.png", 30, max_lines=4).plain.split("\n") == ["▀" * 8] * 4
    (tmp_path / "b.png").write_bytes(b"no picture")
    assert half_blocks(tmp_path / "b.png", 10).plain == str(tmp_path / "b.png")
    for color, ascii, drawn in (("truecolor", False, True), ("truecolor", True, False), (None, False, False)):
        console = Console(width=300, file=io.StringIO(), force_terminal=color is not None, color_system=color)
        console.no_color = False
        console.print(before_after([("cat", tmp_path / "a.png", tmp_path / "a.png")] * 2, 40, ascii=ascii))
        shown = console.file.getvalue()
        assert ("▀" in shown) is drawn and (str(tmp_path / "a.png") in shown) is not drawn
