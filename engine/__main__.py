"""The training process: python -P -m crumb.engine RUN_DIRECTORY. Speaks through the run directory alone."""

import logging
import os
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path

from crumb.engine.optional import hide_broken_packages
from crumb.engine.run.control import clear_requests
from crumb.engine.run.directory import RunDirectory, engine_lock
from crumb.engine.run.events import EventWriter, SilentEvents
from crumb.engine.run.launch import launched_as
from crumb.engine.run.status import SilentStatus, Status
from crumb.profiles.errors import BusyError, CrumbError

log = logging.getLogger("crumb")

GRACE_S = 3.0
"""A launcher ends all processes as soon as one ends badly; so much longer than the others the first has for its last words."""


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or not (Path(arguments[0]) / "plan.toml").is_file():
        print("usage: python -P -m crumb.engine RUN_DIRECTORY (one that holds a plan.toml)", file=sys.stderr)
        return 2
    os.umask(0o077)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    rank, count = launched_as()
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING,
                        format=f"%(asctime)s %(levelname)s {f'process {rank}: ' if count > 1 else ''}%(message)s")
    run = RunDirectory(Path(arguments[0]).absolute())
    try:
        with engine_lock(run) if rank == 0 else nullcontext():
            return _work(run)
    except BusyError as error:
        print(f"crumb: {error}", file=sys.stderr)
        return error.exit_code


def _work(run: RunDirectory) -> int:
    """Runs the job and puts its end, whatever it is, into state.json and events.jsonl."""
    saved = max((int(path.name.removeprefix("step-")) for path in run.checkpoints.glob("step-*")), default=0)
    rank, count = launched_as()
    for folder in (run.control, run.checkpoints, run.samples):  # missing where a run was laid out by hand for two machines
        folder.mkdir(mode=0o700, exist_ok=True)
    events, status = (EventWriter(run.events), Status(run, step=saved, num_processes=count)) if rank == 0 else (
        SilentEvents(), SilentStatus(saved))
    state, code, message = "failed", 1, ""
    # Until the loop takes over, a request to end is an interrupt: nothing is lost before the first step.
    signal.signal(signal.SIGTERM, signal.default_int_handler if count == 1 else _launcher_ends_all)
    try:
        hide_broken_packages(lambda text: events.emit("warning", text=text))
        from crumb.engine.job import run_job  # torch takes seconds: the lock and the first state come before it

        code = run_job(run, events, status)
        state = "done" if code == 0 else "stopped"
    except CrumbError as error:
        code, message = error.exit_code, str(error)
        log.error(message)
    except KeyboardInterrupt:
        if rank == 0:
            clear_requests(run)
        state, code, message = "stopped", 3, "stopped before the first step"
    except Exception as error:
        log.exception("the run failed")
        message = _explain(error, run)
    if message:
        events.emit("error" if state == "failed" else "stopped", text=message, step=status.step)
    status.close(state=state, exit_code=code, message=message)
    events.close()
    if rank and code:
        time.sleep(GRACE_S)
    return code


def _launcher_ends_all(*_) -> None:
    raise CrumbError("The launcher ended this run before its first step, or another of its processes ended. What that one said "
                     "is in the log.")


def _explain(error: Exception, run: RunDirectory) -> str:
    """An unforeseen failure in words; the traceback is in the log."""
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return (f"Out of memory: {error}. Close other programs on this GPU or set gradient_checkpointing = true in "
                f"{run.plan}, then `crumb resume {run.name}`; or start anew with batch_size 1 or a lower rank.")
    if isinstance(error, OSError) and error.errno == 28:
        return f"The disk is full ({error.filename or run.path}). Free some space, then `crumb resume {run.name}`."
    return f"{type(error).__name__}: {error} (an error in crumb; traceback in {run.log})"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
