"""Starts the engine as a process of its own, so that it outlives the terminal that asked for it."""

import os
import subprocess
import sys
import time

from crumb.engine.run.directory import RunDirectory, engine_is_alive
from crumb.profiles.errors import CrumbError


def launch_engine(run: RunDirectory, *, timeout_s: float = 30.0) -> subprocess.Popen:
    """Starts the engine and waits until it holds its lock, or has ended.

    -P keeps the current folder off sys.path: a folder named `kernels` there would be taken for
    Hugging Face's package. The new session makes it deaf to the terminal's hang-up.
    """
    with run.log.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "crumb.engine", str(run.path)],
            env=os.environ | {"CUBLAS_WORKSPACE_CONFIG": os.environ.get("CUBLAS_WORKSPACE_CONFIG", ":4096:8")},
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if engine_is_alive(run) or process.poll() is not None:
            return process
        time.sleep(0.05)
    process.kill()
    raise CrumbError(f"The engine did not start within {timeout_s:.0f} s. Its log: {run.log}")
