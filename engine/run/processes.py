"""One engine per GPU: python -P -m crumb.engine.run.processes RUN_DIRECTORY NUMBER. Torch-free itself.

Stands between the command line and `accelerate launch`, which knows nothing of runs: a request to end becomes a request
to stop and save, and the exit code is the run's own, where accelerate has 1 for all that is not 0.
"""

import signal
import subprocess
import sys
import time
from pathlib import Path

from crumb.engine.run.control import request
from crumb.engine.run.directory import RunDirectory, read_state


def main(arguments: list[str]) -> int:
    run, num_processes = RunDirectory(Path(arguments[0]).absolute()), int(arguments[1])
    started = time.time()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: request(run, "stop"))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    code = subprocess.run(accelerate_command(run, num_processes)).returncode
    state = read_state(run)
    # A state from before the start is that of an earlier engine: this one never came to write its own.
    if state.get("heartbeat", 0.0) >= started and isinstance(state.get("exit_code"), int):
        return state["exit_code"]
    return 1 if code else 0


def accelerate_command(run: RunDirectory, num_processes: int) -> list[str]:
    """`accelerate launch` for this machine alone.

    --multi_gpu means torch's own launcher, on the processor too: with --cpu, accelerate starts one process and leaves
    the others to MPI. --no_python because accelerate's own call of Python has no -P.
    """
    return [
        sys.executable, "-P", "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(num_processes),
        "--num_machines", "1", "--machine_rank", "0", "--main_process_port", "0", "--mixed_precision", "no",
        "--dynamo_backend", "no", "--no_python", sys.executable, "-P", "-m", "crumb.engine", str(run.path),
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
