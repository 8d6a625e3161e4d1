"""The sheet's process: python -P -m crumb.engine.sheet RUN_DIRECTORY REQUEST.

REQUEST is JSON: {"lines": [prompt, ...], "strengths": [0.5, 1.0], "steps": null or a number, "out": "sheet.png"}.
Speaks in JSON lines on stdout: {"type": "progress", "phase", "done", "total"}, warning {text}, error {text}, done {path}.
"""

import json
import logging
import os
import signal
import sys
import time
import traceback
from pathlib import Path

from crumb.engine.optional import hide_broken_packages
from crumb.engine.run.directory import RunDirectory
from crumb.profiles.errors import CrumbError

INTERRUPTED = 130
EVERY_S = 0.2


def main(arguments: list[str]) -> int:
    if len(arguments) != 2 or not (Path(arguments[0]) / "plan.toml").is_file():
        print("usage: python -P -m crumb.engine.sheet RUN_DIRECTORY REQUEST (see the module's head)", file=sys.stderr)
        return 2
    os.umask(0o077)
    logging.basicConfig(level=logging.WARNING)
    # An interrupt lets a file that is being written be taken away again.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return _work(RunDirectory(Path(arguments[0]).absolute()), json.loads(arguments[1]))
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # nobody waits for the picture any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return INTERRUPTED


def _work(run: RunDirectory, request: dict) -> int:
    try:
        hide_broken_packages(lambda text: _tell("warning", text=text))
        from crumb.engine.sheet.draw import save_sheet
        from crumb.engine.sheet.make import Sheet, make_sheet

        out = Path(request["out"])
        picture = make_sheet(Sheet(run, request["lines"], request["strengths"], request["steps"]), _reporter())
        save_sheet(picture, out)
        _tell("done", path=str(out))
        return 0
    except CrumbError as error:
        _tell("error", text=str(error))
        return error.exit_code
    except BrokenPipeError:
        raise
    except Exception as error:
        traceback.print_exc()
        _tell("error", text=_explain(error))
        return 1


def _reporter():
    """Progress as lines: each new phase, its end, and at most five a second between."""
    last_s, last_phase = 0.0, ""

    def report(phase: str, done: int, total: int) -> None:
        nonlocal last_s, last_phase
        now_s = time.monotonic()
        if phase != last_phase or done == total or now_s - last_s >= EVERY_S:
            last_s, last_phase = now_s, phase
            _tell("progress", phase=phase, done=done, total=total)

    return report


def _tell(type: str, **fields) -> None:
    print(json.dumps({"type": type, **fields}), flush=True)


def _explain(error: Exception) -> str:
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return (f"Out of memory: {error}. Close other programs on this GPU, or ask for smaller pictures by options in the "
                f"prompts, such as --w 768 --h 768.")
    if isinstance(error, OSError):
        return f"{error}. Free some space or mend the path, then ask again."
    return f"{type(error).__name__}: {error} (an error in crumb)"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
