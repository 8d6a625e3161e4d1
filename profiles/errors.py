"""The errors that a person is meant to read.

Each says what was found, what is allowed and how to mend it, and carries the exit code of the
command that meets it. Anything else that escapes is a bug and shows as a traceback in the log.
"""


class CrumbError(Exception):
    """A run failed for a reason that can be named (exit code 1)."""

    exit_code = 1


class RequestError(CrumbError):
    """The request was wrong: nothing was started and nothing was changed (exit code 2)."""

    exit_code = 2


class BusyError(CrumbError):
    """The request was right but cannot start now: locked, or the GPU is taken (exit code 75)."""

    exit_code = 75
