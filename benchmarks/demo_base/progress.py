"""What both trainings keep as they go: a state to resume from, whole or not at all, and a line of the log now and then.

    python -P benchmarks/demo_base/progress.py WORK/denoiser.jsonl      # the curve, as text
"""

import json
import time
from pathlib import Path

import torch

from crumb.wizard.dashboard.loss_plot import loss_plot
from crumb.wizard.dashboard.state import LossPoint


def save_state(path: Path, state: dict) -> None:
    scratch = path.with_suffix(".partial")
    torch.save(state, scratch)
    scratch.replace(path)


class Log:
    """Writes the mean of a value every so many steps to a .jsonl file, with the seconds since this start."""

    def __init__(self, path: Path, name: str, every: int):
        self.path, self.name, self.every = path, name, every
        self.began, self.kept = time.monotonic(), []

    def add(self, step: int, value: float) -> None:
        self.kept.append(value)
        if step % self.every:
            return
        mean, seconds = sum(self.kept) / len(self.kept), time.monotonic() - self.began
        self.kept.clear()
        with self.path.open("a") as log:
            log.write(json.dumps({"step": step, self.name: round(mean, 5), "seconds": round(seconds, 1)}) + "\n")


def curve(path: Path, name: str, width: int = 100, height: int = 18) -> str:
    """The logged means over the steps, drawn as the dashboard draws a loss."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    latest = {line["step"]: line[name] for line in lines}  # a training that went on from its state logs some steps twice
    points = [LossPoint(step, value, value) for step, value in sorted(latest.items())]
    return "\n".join(line.plain.rstrip() for line in loss_plot(points, width, height))


if __name__ == "__main__":
    import sys

    for file in map(Path, sys.argv[1:]):
        print(curve(file, "l1" if file.stem == "autoencoder" else "loss"))
