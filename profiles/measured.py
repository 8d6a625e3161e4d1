"""What runs on this machine took, beside what had been predicted: from it, factors for the next prediction.

One JSON object a line in crumb's state folder. Nothing depends on it: a file that can't be read or written is as good as none.
"""

import fcntl
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median

from crumb.profiles.errors import RequestError
from crumb.profiles.gpu_table import name_key
from crumb.profiles.paths import state_dir
from crumb.profiles.speed import ARITHMETIC

KEPT = 200
"""Runs that are remembered; the oldest go."""

COUNTED = 5
"""Of a card's runs in one format, the newest that its factor is taken from."""

BELIEVABLE = (0.1, 20.0)
"""Measured over predicted; what lies outside was no quiet run on that card."""

MAX_FILE_BYTES = 2**20


@dataclass(frozen=True)
class Measured:
    """One run. Predictions are those without any factor, or factors would be learned of factors."""

    gpu: str
    resolution: int
    batch_size: int
    base_format: str
    """quantize_base: no | int8 | nf4."""
    predicted_s: float
    measured_s: float
    predicted_bytes: float
    measured_bytes: float
    versions: dict[str, str]
    arithmetic: int = ARITHMETIC


def record(run: Measured) -> bool:
    """Adds a run to those remembered; False where that can't be, which is no reason to stop a training."""
    try:
        path = _file()
        with _locked(path):
            runs = [*_read(path), run][-KEPT:]
            _replace(path, "".join(json.dumps(asdict(known)) + "\n" for known in runs))
    except (OSError, RequestError, ValueError, TypeError):
        return False
    return True


def remembered() -> list[Measured]:
    """All runs that can still be read, oldest first."""
    try:
        return _read(_file())
    except (OSError, RequestError):
        return []


def time_factor(gpu_name: str, base_format: str) -> float:
    """By what a prediction of seconds is to be multiplied on this card; 1 where nothing was measured.

    The card may be named as the driver does or as a person does.
    """
    return _factor(gpu_name, base_format, lambda run: (run.measured_s, run.predicted_s))


def memory_factor(gpu_name: str, base_format: str) -> float:
    """The same for a prediction of peak bytes."""
    return _factor(gpu_name, base_format, lambda run: (run.measured_bytes, run.predicted_bytes))


def _factor(gpu_name: str, base_format: str, pair) -> float:
    alike = [pair(run) for run in remembered() if run.arithmetic == ARITHMETIC and run.base_format == base_format
             and name_key(run.gpu) == name_key(gpu_name)]
    ratios = [measured / predicted for measured, predicted in alike if predicted > 0 and math.isfinite(measured)]
    believable = [ratio for ratio in ratios if BELIEVABLE[0] <= ratio <= BELIEVABLE[1]]
    return median(believable[-COUNTED:]) if believable else 1.0


def _file() -> Path:
    return state_dir() / "measured.jsonl"


def _read(path: Path) -> list[Measured]:
    """The lines that are what they should be; a torn or foreign one costs only itself."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - MAX_FILE_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    return [run for run in map(_parse, lines) if run]


def _parse(line: str) -> Measured | None:
    try:
        run = Measured(**json.loads(line))
    except (ValueError, TypeError, RecursionError):
        return None
    numbers = {"int": int, "float": (int, float), "str": str}
    right = all(isinstance(getattr(run, field.name), numbers.get(getattr(field.type, "__name__", ""), dict))
                for field in fields(run))
    return run if right else None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One writer at a time; the lock is a file of its own because the other one is replaced."""
    descriptor = os.open(path.with_suffix(".lock"), os.O_CREAT | os.O_WRONLY, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _replace(path: Path, text: str) -> None:
    """Readers see the old file or the new one."""
    temporary = path.with_suffix(".new")  # only the holder of the lock writes it
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
