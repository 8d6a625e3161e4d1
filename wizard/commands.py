"""The commands on runs: train, resume, watch, stop, sample, runs; and verify, which the engine does in its own process."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from crumb.engine.run.control import clear_requests, request
from crumb.engine.run.directory import (
    RunDirectory,
    create_run,
    engine_is_alive,
    find_run,
    list_runs,
    read_state,
    runs_folder,
)
from crumb.engine.run.events import read_events
from crumb.engine.run.launch import launch_engine
from crumb.profiles.errors import BusyError, RequestError
from crumb.profiles.plan import load_plan, load_plan_to_move
from crumb.profiles.preflight import check_gpus, preflight, steps_of_several

NUM_LOG_LINES = 8
TAIL_BYTES = 65536
"""How much of events.jsonl is read for a run's last loss; hundreds of steps fit."""


def train(options) -> int:
    """`crumb train PLAN.toml`: every check comes before the first byte is written."""
    path = Path(options.plan)
    plan, text = load_plan_to_move(path)
    options.gpus = options.gpus or 1
    check_gpus(plan, options.gpus)
    preflight(plan)
    if options.gpus > 1:
        print(steps_of_several(options.gpus, plan.batch_size, plan.gradient_accumulation_steps))
    run = create_run(plan.name, text)
    code = start_and_watch(run, options)
    if code == 2 and not any(run.checkpoints.iterdir()) and not engine_is_alive(run):
        # Refused before its first step: what was wrong has been said, and the name must stay free for the mended plan.
        shutil.rmtree(run.path, ignore_errors=True)
    return code


def resume(options) -> int:
    """`crumb resume RUN`."""
    run = find_run(options.name)
    check_resumable(run)
    plan = load_plan(run.plan)
    options.gpus = options.gpus or read_state(run).get("num_processes", 1)
    check_gpus(plan, options.gpus)
    preflight(plan, resumes=run.has_checkpoints)
    return start_and_watch(run, options)


def check_resumable(run: RunDirectory) -> None:
    state = read_state(run)
    if state["state"] == "done":
        raise RequestError(f"The run {run.name!r} is finished; its LoRA is {run.result}. For a longer one, copy its plan, "
                           f"raise steps, give it another name, and `crumb train` that.")
    if engine_is_alive(run):
        raise BusyError(f"The run {run.name!r} is still at work, or finishing its last step after a stop. See it with `crumb "
                        f"watch {run.name}`.")


def start_and_watch(run: RunDirectory, options) -> int:
    """Starts the engine on the run; watches it unless --detach. Ctrl+C in the dashboard asks it to stop and save."""
    from crumb.wizard.dashboard.live import watch as watch_run

    process = start_engine(run, getattr(options, "gpus", None) or 1)
    if not options.detach:
        return watch_run(run, process=process, plain=options.plain, ascii=options.ascii, stop_on_interrupt=True)
    if process.poll():
        print(engine_died(run, process.returncode), file=sys.stderr)
        return process.returncode if process.returncode in (2, 3, 75) else 1
    print(f"Started {run.name} ({process.pid}). Watch it with: crumb watch {run.name}")
    return 0


def start_engine(run: RunDirectory, gpus: int = 1) -> subprocess.Popen:
    clear_requests(run)
    return launch_engine(run, gpus)


def unused_name(name: str) -> str:
    """The name itself, or NAME-2, NAME-3 ... where that run exists."""
    number, unused = 1, name
    while (runs_folder() / unused).exists():
        number += 1
        unused = f"{name}-{number}"
    return unused


def engine_died(run: RunDirectory, exit_code: int) -> str:
    """What to say of an engine that ended before it got going."""
    lines = run.log.read_text(errors="replace").splitlines()[-NUM_LOG_LINES:]
    return "\n".join([f"crumb: the engine ended at once (exit code {exit_code}). The end of {run.log}:", *lines])


def watch(options) -> int:
    """`crumb watch [RUN]`: leaving it never touches the run."""
    from crumb.wizard.dashboard.live import watch as watch_run

    return watch_run(find_run(options.name), plain=options.plain, ascii=options.ascii, stop_on_interrupt=False)


def stop(options) -> int:
    """`crumb stop RUN`."""
    run = _living(options.name, "stop")
    request(run, "stop")
    print(f"{run.name} stops after its present step and saves everything. Go on later with: crumb resume {run.name}")
    return 0


def sample(options) -> int:
    """`crumb sample RUN`."""
    run = _living(options.name, "make pictures with")
    request(run, "sample")
    print(f"{run.name} makes sample pictures after its present step, in {run.samples}")
    return 0


def _living(name: str, what: str) -> RunDirectory:
    run = find_run(name)
    if not engine_is_alive(run):
        state = read_state(run)["state"]
        mend = "" if state == "done" else f" Go on with it by `crumb resume {run.name}`."
        raise RequestError(f"The run {run.name!r} is not running (it is {state}), so there is nothing to {what}.{mend}")
    return run


def runs(options) -> int:
    """`crumb runs`."""
    found = [summary(run) for run in list_runs()]
    if options.json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
        return 0
    if not found:
        print("There is no run yet. Start one with `crumb`, or try `crumb demo`.")
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for title in ("Run", "State", "Step", "Loss", "Changed"):
        table.add_column(title, no_wrap=True)
    table.add_column("Folder", overflow="fold")
    for run in found:
        loss = "-" if run["loss"] is None else f"{run['loss']:.4f}"
        table.add_row(run["name"], run["state"], f"{run['step']}/{run['steps']}", loss,
                      f"{age_in_words(time.time() - run['changed'])} ago", run["path"])
    Console(highlight=False, markup=False).print(table)
    return 0


def summary(run: RunDirectory) -> dict:
    """One run in a list: `loss` is the last smoothed one or None, `changed` unix seconds."""
    state = read_state(run)
    changed = max(path.stat().st_mtime for path in (run.state, run.plan) if path.exists())
    return {"name": run.name, "state": state["state"], "step": state.get("step", 0), "steps": state.get("steps", 0),
            "loss": _last_loss(run), "changed": round(changed), "path": str(run.path)}


def _last_loss(run: RunDirectory) -> float | None:
    size = run.events.stat().st_size if run.events.exists() else 0
    events, _ = read_events(run.events, max(0, size - TAIL_BYTES))
    return next((event.get("loss_smoothed") for event in reversed(events) if event["type"] == "step"), None)


def age_in_words(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"


def verify(options) -> int:
    """`crumb verify FILE`, in a process of its own because it loads torch."""
    command = [sys.executable, "-P", "-m", "crumb.engine.network.verify", options.file]
    return subprocess.run(command + ["--json"] * options.json).returncode
