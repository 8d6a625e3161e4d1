"""`crumb sheet` on a run of a real process: its cells are the pictures that training itself has drawn."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crumb.engine.memory.placement import choose_placement
from crumb.engine.run.directory import RunDirectory, create_run
from crumb.engine.run.lora_files import lora_files
from crumb.engine.sheet import make
from crumb.engine.sheet.__main__ import _work
from crumb.engine.sheet.make import BASE, Sheet, draw_cells, make_sheet
from crumb.profiles.base_model import inspect_base_model
from crumb.profiles.plan import dump_plan, load_plan
from crumb.profiles.sample_prompts import sample_prompts

PROMPTS = '["ohwx cat --w 192 --h 64 --l 4", "a dog --n blurry --d 3"]'


def crumb(*arguments, **environment):
    return subprocess.run([sys.executable, "-P", "-m", "crumb.wizard", *map(str, arguments)], capture_output=True, text=True,
                          env=os.environ | environment, check=False)


@pytest.fixture(scope="module")
def run(tiny_base, photographs, tmp_path_factory) -> RunDirectory:
    """Eight steps with a checkpoint and samples every four; the files in fp32, as the training weights are."""
    folder = tmp_path_factory.mktemp("sheet")
    settings = {"steps": 8, "rank": 4, "alpha": 2, "save_every": 4, "sample_every": 4, "judge_every": 4, "sample_steps": 3,
                "learning_rate": "1e-2", "save_precision": "float", "held_out_pictures": 1, "sample_prompts": PROMPTS,
                "conv_rank": 2}
    planned = crumb("plan", "--images", photographs, "--base", tiny_base, "--subject", "style", "--gpu", "cpu",
                    "--trigger", "ohwx", *(f"--set={name}={value}" for name, value in settings.items()), "--out",
                    folder / "plan.toml")
    assert planned.returncode == 0, planned.stderr
    done = crumb("train", folder / "plan.toml", "--plain", CRUMB_RUNS=str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    return RunDirectory(folder / "ohwx")


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture, int)


def test_strength_1_is_what_training_drew_and_0_is_the_base(run):
    plan = load_plan(run.plan)
    files = lora_files(run, plan.steps)
    assert [file.step for file in files] == [4, 8]
    cells = [BASE, *((file, strength) for file in files for strength in (0.5, 1.0))]
    told = []
    base, report = inspect_base_model(Path(plan.base_model)), lambda *progress: told.append(progress)
    drawn = draw_cells(plan, base, choose_placement(plan), sample_prompts(plan), cells, 1.0, report)
    for cell, step in ((BASE, 0), ((files[0], 1.0), 4), ((files[1], 1.0), 8)):
        for index in range(2):
            ours, theirs = np.asarray(drawn[cell][index], int), pixels(run.samples / f"step-{step:06d}-{index}.png")
            assert ours.shape == theirs.shape and np.abs(ours - theirs).max() <= 1, (cell, index)
    halves = np.abs(np.asarray(drawn[files[1], 0.5][0], int) - np.asarray(drawn[files[1], 1.0][0], int))
    assert halves.max() > 1, "the strength must be seen"
    assert np.abs(pixels(run.samples / "step-000000-0.png") - pixels(run.samples / "step-000008-0.png")).max() > 10
    assert ("denoise", 2 * 3 * 5, 2 * 3 * 5) in told


def test_the_run_kept_its_grid_and_before_after(run):
    assert pixels(run.samples / "grid.png").shape[1] >= 3 * 192
    assert pixels(run.result.with_suffix(".png")).shape[1] >= 2 * 192


def test_command_writes_the_sheet_and_names_the_files(run):
    earlier = sorted(run.path.iterdir())
    done = crumb("sheet", run.path, "--strengths", "0.5,1.0", "--plain")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"The sheet: {run.path / 'sheet.png'}" in done.stdout and "drawing 10 pictures" in done.stdout
    best = min(lora_files(run, 8), key=lambda file: file.judged.held_out_loss)
    for file in lora_files(run, 8):
        end = "  best" if file == best else ""
        assert f"  step {file.step}{' (final)' * (file.step == 8)}  held-out loss {file.judged.held_out_loss:.4f}{end}\n" \
               f"    {file.path}\n" in done.stdout
    assert sorted(run.path.iterdir()) == sorted([*earlier, run.path / "sheet.png"])

    sheet, sample = pixels(run.path / "sheet.png"), pixels(run.samples / "step-000004-0.png")
    places = [(y, x) for y, x in np.argwhere((sheet == sample[0, 0]).all(axis=2))
              if sheet[y : y + 64, x : x + 192].shape == sample.shape
              and np.abs(sheet[y : y + 64, x : x + 192] - sample).max() <= 1]
    assert len(places) == 1, "the first checkpoint at strength 1.0 stands whole in the sheet"


def test_new_prompts_are_encoded_and_steps_replaced(run, tmp_path):
    done = crumb("sheet", run.path, "--prompts", "something quite new --w 64 --h 64", "--steps", "1", "--strengths", "1",
                 "--out", tmp_path / "new.png", "--plain")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "drawing 3 pictures" in done.stdout and (tmp_path / "new.png").stat().st_size > 1000
    again = crumb("sheet", run.path, "--out", tmp_path / "new.png")
    assert again.returncode == 2 and "exists already" in again.stderr


@pytest.mark.parametrize(("steps", "titles"), [
    (None, ["a cat", "a dog --s 30 --n blurry"]), (7, ["a cat --s 7", "a dog --n blurry --s 7"])])
def test_titles_say_the_steps_that_were_drawn(tiny_base, make_plan, monkeypatch, steps, titles):
    """Nothing is drawn: what the drawing was asked for is compared with what stands over its pictures."""
    created = create_run("t", dump_plan(make_plan(base_model=str(tiny_base), sample_steps=5)))
    created.result.touch()
    asked, blocks = [], []

    def draw_nothing(plan, base, placement, prompts, cells, scale, report):
        asked.extend(prompts)
        return {cell: [Image.new("RGB", (64, 64))] * len(prompts) for cell in cells}
    monkeypatch.setattr(make, "draw_cells", draw_nothing)
    monkeypatch.setattr(make, "draw_sheet", lambda heading, columns, of_sheet: blocks.extend(of_sheet))
    make_sheet(Sheet(created, ["a cat", "a dog --s 30 --n blurry"], [1.0], steps), lambda *progress: None)
    assert [prompt.steps for prompt in asked] == [steps or 5, steps or 30]
    assert [block.title for block in blocks] == titles


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_leaving_ends_the_drawing_and_leaves_nothing(run, tmp_path, number):
    process = subprocess.Popen([sys.executable, "-P", "-m", "crumb.wizard", "sheet", str(run.path), "--steps", "200", "--plain",
                                "--out", str(tmp_path / "sheet.png")], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True)
    for line in process.stdout:
        if "drawing" in line:
            break
    engine = int(subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    if number == signal.SIGINT:
        assert process.returncode == 130 and "interrupted" in errors and "Traceback" not in errors
    wait_for_end(engine)
    assert list(tmp_path.iterdir()) == []


def wait_for_end(pid: int, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[-1][:3]:
        assert time.monotonic() < deadline, "the engine goes on without its terminal"
        time.sleep(0.1)


def test_a_torn_checkpoint_is_said_in_words(run, tmp_path, capsys):
    copy = RunDirectory(tmp_path / "ohwx")
    shutil.copytree(run.path, copy.path)
    lora_files(copy, 8)[0].path.write_bytes(b"torn")
    out = tmp_path / "sheet.png"
    assert _work(copy, {"lines": ["a"], "strengths": [1.0], "steps": 1, "out": str(out)}) == 2
    *_, error = map(json.loads, capsys.readouterr().out.splitlines())
    assert error["type"] == "error" and "truncated" in error["text"] and not out.exists()
