"""The training process: python -P -m crumb.engine RUN_DIRECTORY. Speaks through the run directory alone."""

import logging
import os
import signal
import sys
from pathlib import Path

from crumb.engine.optional import hide_broken_packages
from crumb.engine.run.control import clear_requests
from crumb.engine.run.directory import RunDirectory, engine_lock
from crumb.engine.run.events import EventWriter
from crumb.engine.run.status import Status
from crumb.profiles.errors import BusyError, CrumbError

log = logging.getLogger("crumb")


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or not (Path(arguments[0]) / "plan.toml").is_file():
        print("usage: python -P -m crumb.engine RUN_DIRECTORY (one that holds a plan.toml)", file=sys.stderr)
        return 2
    os.umask(0o077)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    run = RunDirectory(Path(arguments[0]).absolute())
    try:
        with engine_lock(run):
            return _work(run)
    except BusyError as error:
        print(f"crumb: {error}", file=sys.stderr)
        return error.exit_code


def _work(run: RunDirectory) -> int:
    """Runs the job and puts its end, whatever it is, into state.json and events.jsonl."""
    saved = max((int(path.name.removeprefix("step-")) for path in run.checkpoints.glob("step-*")), default=0)
    events, status = EventWriter(run.events), Status(run, step=saved)
    state, code, message = "failed", 1, ""
    # Until the loop takes over, a request to end is an interrupt: nothing is lost before the first step.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        hide_broken_packages(lambda text: events.emit("warning", text=text))
        from crumb.engine.job import run_job  # torch takes seconds: the lock and the first state come before it

        code = run_job(run, events, status)
        state = "done" if code == 0 else "stopped"
    except CrumbError as error:
        code, message = error.exit_code, str(error)
        log.error(message)
    except KeyboardInterrupt:
        clear_requests(run)
        state, code, message = "stopped", 3, "stopped before the first step"
    except Exception as error:
        log.exception("the run failed")
        message = _explain(error, run)
    if message:
        events.emit("error" if state == "failed" else "stopped", text=message, step=status.step)
    status.close(state=state, exit_code=code, message=message)
    events.close()
    return code


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
