"""Starts the engine as a process of its own, so that it outlives the terminal that asked for it."""

import os
import signal
import subprocess
import sys
import time

from crumb.engine.run.directory import RunDirectory, engine_is_alive
from crumb.profiles.errors import CrumbError

START_S = 30.0
START_OF_SEVERAL_S = 120.0
"""Longer, because accelerate loads torch before it starts the engine."""


def launch_engine(run: RunDirectory, num_processes: int = 1) -> subprocess.Popen:
    """Starts the engine, in as many processes as there are GPUs to train on; waits until it holds its lock, or has ended.

    -P keeps the current folder off sys.path: a folder named `kernels` there would be taken for
    Hugging Face's package. The new session makes it deaf to the terminal's hang-up.
    """
    program = ["crumb.engine", str(run.path)]
    if num_processes > 1:
        program = ["crumb.engine.run.processes", str(run.path), str(num_processes)]
    with run.log.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", *program],
            env=os.environ | {"CUBLAS_WORKSPACE_CONFIG": os.environ.get("CUBLAS_WORKSPACE_CONFIG", ":4096:8")},
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )
    timeout_s = START_S if num_processes == 1 else START_OF_SEVERAL_S
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if engine_is_alive(run) or process.poll() is not None:
            return process
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    raise CrumbError(f"The engine did not start within {timeout_s:.0f} s. Its log: {run.log}")


def launched_as() -> tuple[int, int]:
    """This process's number among those that `accelerate launch` started for the run, and how many they are."""
    count = int(os.environ.get("WORLD_SIZE", 1))
    return (int(os.environ["RANK"]), count) if count > 1 else (0, 1)
