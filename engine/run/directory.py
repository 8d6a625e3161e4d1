"""The run directory: where everything about one run lies, and the only thing engine and watchers share.

Torch-free. The engine writes it, wizard and dashboards read it; requests go in through `control/`.
"""

import contextlib
import fcntl
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from crumb.profiles.errors import BusyError, RequestError
from crumb.profiles.paths import state_dir

HEARTBEAT_S = 5.0
"""How often the engine refreshes state.json while it lives."""


@dataclass(frozen=True)
class RunDirectory:
    """The paths of one run."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def plan(self) -> Path:
        return self.path / "plan.toml"

    @property
    def state(self) -> Path:
        return self.path / "state.json"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def log(self) -> Path:
        return self.path / "engine.log"

    @property
    def control(self) -> Path:
        return self.path / "control"

    @property
    def lock(self) -> Path:
        return self.path / "engine.lock"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def has_checkpoints(self) -> bool:
        return any(self.checkpoints.glob("step-*"))

    @property
    def fit(self) -> Path:
        """How the run lies in memory, where it had to give something up."""
        return self.path / "fit.json"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def result(self) -> Path:
        return self.path / f"{self.name}.safetensors"


def runs_folder() -> Path:
    """Where new runs are made: $CRUMB_RUNS, else `runs` in the current folder."""
    return Path(os.environ.get("CRUMB_RUNS") or "runs").absolute()


def create_run(name: str, plan_text: str, folder: Path | None = None) -> RunDirectory:
    """Makes folder/NAME with its plan; never touches a run that is already there."""
    check_run_name(name)
    run = RunDirectory((folder or runs_folder()) / name)
    try:
        run.path.parent.mkdir(parents=True, exist_ok=True)
        run.path.mkdir(mode=0o700)
    except FileExistsError:
        raise RequestError(
            f"The run {name!r} exists already at {run.path}. Go on with it by `crumb resume {name}`, "
            f"or give this one another name (--name)."
        ) from None
    except OSError as error:
        raise RequestError(
            f"The run folder {run.path} can't be made ({error.strerror}). Set CRUMB_RUNS to a folder you can write to."
        ) from None
    for folder_path in (run.control, run.checkpoints, run.samples):
        folder_path.mkdir(mode=0o700)
    write_atomic(run.plan, plan_text.encode())
    _remember(run)
    return run


def check_run_name(name: str) -> None:
    """A run name is a file name and the word in <lora:NAME:1>."""
    if not re.fullmatch(r"[\w][\w .+-]{0,79}", name) or name != name.strip():
        raise RequestError(
            f"The name {name!r} can't be used: it becomes a folder, a file and the word in <lora:NAME:1>. "
            f"Use letters, digits, '-', '_' and '.', at most 80, starting with a letter or digit."
        )


def find_run(name: str | None) -> RunDirectory:
    """The run of that name or path; with None the one that was used last."""
    runs = list_runs()
    if name is None:
        if not runs:
            raise RequestError("There is no run yet. Start one with `crumb` or `crumb train plan.toml`.")
        return runs[0]
    as_path = Path(name)
    if (as_path / "plan.toml").is_file():
        return RunDirectory(as_path.absolute())
    for run in runs:
        if run.name == name:
            return run
    known = ", ".join(run.name for run in runs[:5]) or "none"
    raise RequestError(f"There is no run called {name!r}. Known runs: {known}. `crumb runs` lists them all.")


def list_runs() -> list[RunDirectory]:
    """Every run known to this person, the one that changed last first."""
    folders = {runs_folder()}
    if _index().exists():
        folders |= {Path(line) for line in _index().read_text().splitlines() if line}
    runs = {
        path.parent.resolve(): RunDirectory(path.parent)
        for folder in folders if folder.is_dir()
        for path in folder.glob("*/plan.toml")
    }
    return sorted(runs.values(), key=lambda run: _last_change(run), reverse=True)


def _last_change(run: RunDirectory) -> float:
    return max(path.stat().st_mtime for path in (run.state, run.plan) if path.exists())


def _index() -> Path:
    return state_dir() / "run-folders.txt"


def _remember(run: RunDirectory) -> None:
    """Notes the folder that holds the run, so that `crumb watch` finds it from any other folder."""
    folder = str(run.path.parent)
    known = _index().read_text().splitlines() if _index().exists() else []
    if folder not in known:
        write_atomic(_index(), "\n".join([*known, folder, ""]).encode())


def write_atomic(path: Path, data: bytes) -> None:
    """Replaces a file so that a reader, or a power cut, sees the old content or the new, never half."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Makes a rename inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_state(run: RunDirectory) -> dict:
    """state.json as a dict with at least `state`; `lost` where an engine died without a word."""
    try:
        state = json.loads(run.state.read_text())
    except (OSError, ValueError):
        return {"state": "preparing" if engine_is_alive(run) else "new", "step": 0, "steps": 0}
    if state["state"] in ("preparing", "training", "sampling", "saving") and not engine_is_alive(run):
        state["state"] = "lost"
    return state


def write_state(run: RunDirectory, **fields) -> None:
    write_atomic(run.state, json.dumps({**fields, "heartbeat": time.time()}, indent=1).encode())


@contextlib.contextmanager
def engine_lock(run: RunDirectory) -> Iterator[None]:
    """Held by the one engine that works on the run; the kernel drops it when the process dies."""
    descriptor = os.open(run.lock, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        for attempts_left in reversed(range(20)):  # a watcher that asks holds the lock for a blink
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if not attempts_left:
                    raise BusyError(
                        f"Another engine is already working on the run {run.name!r}. See it with `crumb watch {run.name}`."
                    ) from None
                time.sleep(0.05)
        yield
    finally:
        os.close(descriptor)


def engine_is_alive(run: RunDirectory) -> bool:
    """Asks the lock, not a process number, which another program may have by now."""
    try:
        descriptor = os.open(run.lock, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False
