"""`crumb sheet RUN`: checkpoints x strengths in one picture, drawn by an engine process of its own."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from crumb.engine.run.directory import RunDirectory, engine_is_alive, find_run, list_runs
from crumb.engine.run.lora_files import LoraFile, lora_files
from crumb.profiles.errors import BusyError, CrumbError, RequestError
from crumb.profiles.hardware import detect_gpu
from crumb.profiles.plan import Plan, check_value, load_plan
from crumb.profiles.sample_prompts import parse_sample_prompts

PHASES = {
    "hash": "reading the base model", "encode": "encoding prompts", "load": "loading the base model",
    "denoise": "drawing {pictures} pictures", "decode": "developing them", "draw": "putting the sheet together",
}
LINE_EVERY_S = 5.0
PATIENCE_S = 10.0
NUM_ERROR_LINES = 8
MIN_CELLS, MAX_LINES = 10, 60
"""Letters across that a picture of the sheet needs to be recognised, and lines that the whole may fill."""


def sheet(options) -> int:
    """`crumb sheet RUN`: all that can be refused is refused before torch is loaded."""
    run = find_run(options.name)
    plan = load_plan(run.plan)
    files = lora_files(run, plan.steps)
    if not files:
        raise RequestError(f"The run {run.name!r} has no LoRA file yet, so there is nothing to compare. Its plan makes a "
                           f"checkpoint every {plan.save_every} steps and a file at step {plan.steps}.")
    lines = chosen_prompts(options.prompts, plan)
    steps = check_value("sample_steps", options.steps) if options.steps else None
    out = out_path(options.out, run)
    check_gpu_is_free(run, plan)
    request = {"lines": lines, "strengths": options.strengths, "steps": steps, "out": str(out)}
    num_pictures = len(lines) * (1 + len(files) * len(options.strengths))
    code = draw(run, request, num_pictures, options)
    if code == 0:
        show(out, files, len(options.strengths), options)
    return code


def chosen_prompts(asked: list[str] | None, plan: Plan) -> list[str]:
    """Prompt lines: the plan's, the first N of them, or new ones; each is checked."""
    lines = plan.sample_prompts
    if asked and len(asked) == 1 and asked[0].isdecimal():
        if not 1 <= int(asked[0]) <= len(lines):
            raise RequestError(f"--prompts is {asked[0]}; the run's plan has {len(lines)} sample prompts. Give a number up to "
                               f"that, or prompts in quotes.")
        lines = lines[: int(asked[0])]
    elif asked:
        lines = asked
    if not lines:
        raise RequestError("The run's plan has no sample prompts. Give some: --prompts \"a red apple\" \"a portrait\"")
    parse_sample_prompts(lines, plan)
    return lines


def out_path(asked: str | None, run: RunDirectory) -> Path:
    """Where the picture goes; only crumb's own sheet in the run's folder is ever replaced."""
    own = run.path / "sheet.png"
    path = Path(asked).expanduser().absolute() if asked else own
    if path.suffix.lower() != ".png":
        raise RequestError(f"--out is {asked}; the sheet is a PNG. Use {path.with_suffix('.png').name}.")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise RequestError(f"The folder {path.parent} is not there or can't be written to. Make it, or give --out elsewhere.")
    if path.exists() and path != own:
        raise RequestError(f"{path} exists already. Give --out another name, or remove it.")
    return path


def check_gpu_is_free(run: RunDirectory, plan: Plan) -> None:
    """BusyError while a run trains on the GPU that the sheet would be drawn with: it could lose its memory."""
    if plan.device == "cpu" or not detect_gpu():
        return
    for other in [run, *list_runs()]:
        if engine_is_alive(other) and _device(other) != "cpu":
            raise BusyError(f"The run {other.name!r} is training on the GPU, and a sheet drawn beside it could take the memory "
                            f"it needs. Wait for its end, or stop it: `crumb stop {other.name}`, and `crumb resume "
                            f"{other.name}` afterwards.")


def _device(run: RunDirectory) -> str:
    try:
        return load_plan(run.plan).device
    except CrumbError:
        return "auto"


def draw(run: RunDirectory, request: dict, num_pictures: int, options) -> int:
    """Runs the engine's process and shows how far it is; leaving takes the process along. Returns its exit code."""
    command = [sys.executable, "-P", "-m", "crumb.engine.sheet", str(run.path), json.dumps(request)]
    environment = os.environ | {"CUBLAS_WORKSPACE_CONFIG": os.environ.get("CUBLAS_WORKSPACE_CONFIG", ":4096:8")}
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        # A session of its own: Ctrl-C reaches us alone, and we end the process by a signal that it can clean up after.
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log,
                                   text=True, start_new_session=True)
        error = ""
        try:
            with _progress(num_pictures, options) as tell:
                for event in _events(process):
                    if event["type"] == "progress":
                        tell(event)
                    elif event["type"] == "warning":
                        print(f"warning: {event['text']}", file=sys.stderr)
                    elif event["type"] == "error":
                        error = event["text"]
            code = process.wait()
        finally:
            _end(process)
        if code:
            log.seek(0)
            last_lines = log.read().splitlines()[-NUM_ERROR_LINES:]
            print("\n".join([f"crumb: {error or 'the drawing process died'}", *(last_lines if code == 1 or not error else [])]),
                  file=sys.stderr)
    return code if code in (0, 2, 75) else 1


def _events(process: subprocess.Popen) -> Iterator[dict]:
    """What the process tells; a library may print lines of its own between."""
    for line in process.stdout:
        with suppress(ValueError):
            event = json.loads(line)
            if isinstance(event, dict) and "type" in event:
                yield event


def _end(process: subprocess.Popen) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def _progress(num_pictures: int, options) -> Iterator:
    """What shows a progress event: a bar, or now and then a line."""
    def words(event: dict) -> str:
        return PHASES.get(event["phase"], event["phase"]).format(pictures=num_pictures)

    in_place = sys.stdout.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown", "")
    if options.plain or options.ascii or not in_place:
        yield _line_teller(words)
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(TextColumn("{task.description}", markup=False), BarColumn(), TimeRemainingColumn(), transient=True) as bar:
        tasks = {}

        def tell(event: dict) -> None:
            if event["phase"] not in tasks:
                for task in tasks.values():
                    bar.remove_task(task)
                tasks.clear()
                tasks[event["phase"]] = bar.add_task(words(event))
            bar.update(tasks[event["phase"]], completed=event["done"], total=event["total"])

        yield tell


def _line_teller(words):
    from crumb.wizard.dashboard.plain import say

    last_s, last_phase = 0.0, ""

    def tell(event: dict) -> None:
        nonlocal last_s, last_phase
        now_s = time.monotonic()
        if event["phase"] == last_phase and now_s - last_s < LINE_EVERY_S:
            return
        last_s, last_phase = now_s, event["phase"]
        share = f"  {100 * event['done'] // event['total']} %" if event["done"] else ""
        say(words(event) + share)

    return tell


def show(path: Path, files: list[LoraFile], num_strengths: int, options) -> None:
    """The picture where the terminal can show it; the files it compares; its path."""
    from PIL import Image
    from rich.console import Console

    from crumb.wizard.dashboard.pictures import can_show_pictures, graphics, half_blocks

    console = Console(highlight=False, markup=False)
    if can_show_pictures(console, options.ascii) and not options.plain:
        with Image.open(path) as picture:
            width = min(console.width - 1, round(2 * MAX_LINES * picture.width / picture.height))
        legible = width / (num_strengths + 2) >= MIN_CELLS  # the base and the labels take a column each
        drawn = graphics(path, console.width) or (half_blocks(path, width) if legible else None)
        if drawn is not None:
            console.print(drawn)
    print("Rows from above, the same for each prompt; the first column is the base model alone:")
    for file in files:
        print(f"  {'  '.join(file.describe())}\n    {file.path}")
    print(f"The sheet: {path}")
