"""What both trainings keep as they go: a state to resume from, whole or not at all, and a line of the log now and then."""

import json
import time
from pathlib import Path

import torch


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
