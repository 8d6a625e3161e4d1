"""Requests to a running engine: one file each in control/, taken (deleted) by the engine between steps."""

from crumb.engine.run.directory import RunDirectory

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


def clear_requests(run: RunDirectory) -> None:
    """Forgets what was asked of an engine that is no more."""
    for what in REQUESTS:
        take_request(run, what)
