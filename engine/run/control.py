"""Requests to a running engine: one file each in control/, taken (deleted) by the engine between steps."""

import signal
import time
from collections.abc import Callable

from crumb.engine.run.directory import RunDirectory
from crumb.engine.run.events import EventWriter

REQUESTS = ("stop", "sample", "save")


def request(run: RunDirectory, what: str) -> None:
    """Leaves a request; asking twice is the same as asking once."""
    (run.control / what).touch(mode=0o600)


def take_request(run: RunDirectory, what: str) -> bool:
    """True once for each request."""
    try:
        (run.control / what).unlink()
    except FileNotFoundError:
        return False
    return True


def progress_reporter(run: RunDirectory, events: EventWriter, phase: str) -> Callable[[int, int], None]:
    """A callback for work before the first step: writes `progress` events and obeys a request to stop.

    Events: the first, the last, and at most five a second between. A stop is a KeyboardInterrupt: what was cached
    stays cached, and there is nothing else to save yet.
    """
    last_s = -1.0

    def report(done: int, total: int) -> None:
        nonlocal last_s
        if (run.control / "stop").exists():
            raise KeyboardInterrupt
        now_s = time.monotonic()
        if done == total or now_s - last_s >= 0.2:
            last_s = now_s
            events.emit("progress", phase=phase, done=done, total=total)

    return report


def catch_signals() -> Callable[[], bool]:
    """SIGTERM and SIGINT ask for a stop after the step; returns the question whether one came."""
    asked = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: asked.append(True))
    return lambda: bool(asked)


def clear_requests(run: RunDirectory) -> None:
    """Forgets what was asked of an engine that is no more."""
    for what in REQUESTS:
        take_request(run, what)
