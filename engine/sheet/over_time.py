"""A run's sample pictures over its steps: the grid beside them, and before and after beside the LoRA file.

Torch-free; reads the pictures that sampling has left, so that a resumed run shows its first life too.
"""

import re
from pathlib import Path

from PIL import Image

from crumb.engine.sheet.draw import Block, Row, draw_sheet, save_sheet, sheet_scale, shrunk

MAX_COLUMNS = 12

SAMPLE = re.compile(r"step-(\d+)-(\d+)\.png")


def draw_over_time(folder: Path, heading: str, prompts: list[str]) -> Path | None:
    """folder/grid.png, a prompt per row and a step per column, oldest left; None where no picture can be read."""
    return _draw(folder, heading, prompts, thinned(sampled_steps(folder)), folder / "grid.png")


def draw_before_after(folder: Path, heading: str, prompts: list[str], last_step: int, path: Path) -> Path | None:
    """The first and the last pictures only; None unless there are both."""
    steps = sampled_steps(folder)
    return _draw(folder, heading, prompts, [0, last_step], path) if {0, last_step} <= set(steps) else None


def sampled_steps(folder: Path) -> list[int]:
    """Steps that have a picture, rising."""
    return sorted({int(match[1]) for path in folder.iterdir() if (match := SAMPLE.fullmatch(path.name))})


def thinned(steps: list[int], max_columns: int = MAX_COLUMNS) -> list[int]:
    """At most `max_columns` of them, evenly, the first and the last always."""
    if len(steps) <= max_columns:
        return steps
    return [steps[round(index * (len(steps) - 1) / (max_columns - 1))] for index in range(max_columns)]


def _draw(folder: Path, heading: str, prompts: list[str], steps: list[int], path: Path) -> Path | None:
    names = [[folder / f"step-{step:06d}-{index}.png" for step in steps] for index in range(len(prompts))]
    sizes = [size for row in names for size in map(_size, row) if size]
    if not sizes:
        return None
    scale = sheet_scale(sizes)
    blocks = [Block(prompt, [Row([], [_picture(file, scale) for file in row])]) for prompt, row in zip(prompts, names)]
    save_sheet(draw_sheet(heading, [f"step {step}" for step in steps], blocks), path)
    return path


def _size(path: Path) -> tuple[int, int] | None:
    try:
        with Image.open(path) as picture:
            return picture.size
    except OSError:  # not there, or half of it after a power cut
        return None


def _picture(path: Path, scale: float) -> Image.Image | None:
    try:
        with Image.open(path) as picture:
            return shrunk(picture.convert("RGB"), scale)
    except OSError:
        return None
