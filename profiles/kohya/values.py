"""Values as sd-scripts and kohya_ss write them: numbers in quotes, key=value lists, lists by block, prompts with flags."""

import ast
import math
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BLOCKS = (*(f"IN{number:02}" for number in range(9)), "MID", *(f"OUT{number:02}" for number in range(9)))
"""The U-Net's blocks by crumb's names; sd-scripts counts 23: two without LoRA at the ends, and the middle as three."""

BLOCK_POSITIONS = (None, *BLOCKS[:9], "MID", "MID", "MID", *BLOCKS[10:], None)
"""sd-scripts' 23 positions."""

DOWN_WEIGHTS, MID_WEIGHTS, UP_WEIGHTS = BLOCKS[:9], ("MID",) * 3, BLOCKS[10:]


class Untaken(Exception):
    """A setting that the other side can't hold; the message is a sentence on why, or on what happens instead."""


@dataclass(frozen=True)
class Length:
    """What is only known once the pictures are: how long the run gets."""

    steps: int
    steps_per_epoch: float
    num_pictures: int


@dataclass(frozen=True)
class Later:
    """A value that follows from the run's length, such as "every 2 epochs" in steps."""

    of: Callable[[Length], Any]


@dataclass
class KohyaFile:
    """A settings file by sd-scripts' names, whatever it called them. Blank values are left out."""

    path: Path
    gui: bool
    """Made by the kohya_ss GUI, which lists every setting; a missing key then means that this version had none."""
    settings: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, tuple[str, Any]] = field(default_factory=dict)
    """Key and value as they stand in the file, by sd-scripts' name, where that differs."""
    missing: list[tuple[str, Any, str]] = field(default_factory=list)
    """Key, value, reason: what crumb can't hold, found on reading."""
    unused: list[tuple[str, Any, str]] = field(default_factory=list)
    """Key, value, reason: what kohya's own program would not use."""
    remarks: list[str] = field(default_factory=list)
    """Sentences on the setting that is being read just now."""

    def __contains__(self, key: str) -> bool:
        return key in self.settings

    def __getitem__(self, key: str) -> Any:
        return self.settings[key]

    def get(self, key: str, default: Any = None) -> Any:
        return self.settings.get(key, default)

    def source(self, key: str) -> tuple[str, Any]:
        return self.sources.get(key, (key, self.settings.get(key)))

    def is_on(self, key: str) -> bool:
        return key in self and truth(self[key])

    def find(self, path: str) -> Path | None:
        """A path that the file names, from here or from the file's own folder; None where it leads nowhere."""
        for folder in (Path.cwd(), self.path.absolute().parent):
            found = folder / Path(path).expanduser()
            if found.exists():
                return found
        return None


def number(value: Any) -> float:
    try:
        if isinstance(value, bool) or not math.isfinite(result := float(value)):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise Untaken(f"{value!r} is no number") from None
    return result


def whole(value: Any) -> int:
    result = number(value)
    if not result.is_integer():
        raise Untaken(f"{value!r} is no whole number")
    return int(result)


def truth(value: Any) -> bool:
    known = {"true": True, "1": True, "false": False, "0": False}
    text = str(int(value) if isinstance(value, float) and value.is_integer() else value).lower()
    if text not in known:
        raise Untaken(f"{value!r} is neither true nor false")
    return known[text]


def is_neutral(value: Any, neutral: tuple) -> bool:
    """Whether a value, however it is written, is one of those that change nothing."""
    if value in neutral or str(value).lower() in (str(item).lower() for item in neutral):
        return True
    try:
        return number(value) in [item for item in neutral if isinstance(item, int | float)]
    except Untaken:
        return False


def pairs(value: Any) -> dict[str, str]:
    """`key=value` as a list, or as one text with or without quotes (the GUI)."""
    if isinstance(value, dict):
        return {key: str(item) for key, item in value.items()}
    items = value if isinstance(value, list) else split_words(str(value))
    split = (str(item).partition("=") for item in items)
    return {key.strip(): item.strip() for key, equals, item in split if equals}


def split_words(text: str) -> list[str]:
    """Words as a shell sees them; where quotes don't match, by spaces, as the GUI does."""
    try:
        return shlex.split(text)
    except ValueError:
        return text.replace('"', "").split()


def argument(text: str) -> Any:
    """One optimizer argument, a Python literal in sd-scripts: number, truth value, or numbers with commas as a list."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise Untaken(f"{text!r} is no number, true or false") from None
    return list(value) if isinstance(value, tuple) else value


def argument_text(value: Any) -> str:
    return ",".join(map(repr, value)) if isinstance(value, list) else repr(value)


def resolution_side(value: Any) -> int:
    """The side of the square whose area is trained, a multiple of 64, from `1024`, `"1024,768"` or `[1024, 768]`."""
    sides = value if isinstance(value, list) else str(value).split(",")
    numbers = [number(side) for side in sides]
    if not numbers or min(numbers) <= 0:
        raise Untaken(f"{value!r} is no size in pixels")
    area = math.prod(numbers) if len(numbers) > 1 else numbers[0] ** 2
    return max(64, round(math.sqrt(area) / 64) * 64)


def blocks_of(value: Any, positions: tuple, general: float, read: Callable = number, middle: int = 1) -> dict[str, Any]:
    """Values of a comma-separated list by block, without those that equal the general one.

    Of the middle's three `middle` counts: the second holds the attention, the first and the third 3x3 convolutions.
    """
    items = value if isinstance(value, list) else str(value).split(",")
    if len(items) != len(positions):
        raise Untaken(f"it holds {len(items)} values; SDXL has {len(positions)}")
    values = [read(item) for item in items]
    found = {block: item for block, item in zip(positions, values) if block and block != "MID"}
    of_middle = [item for block, item in zip(positions, values) if block == "MID"]
    if of_middle:
        found["MID"] = of_middle[middle]
    return {block: found[block] for block in BLOCKS if block in found and found[block] != general}


def block_list(values: dict[str, Any], positions: tuple, general: float) -> str:
    return ",".join(repr(values.get(block, general)) for block in positions)


def weight_list(value: Any, count: int) -> list[float]:
    """Rate factors: numbers with commas (a gap is 0, what is missing is 1), or a curve by name such as `sine+.25`."""
    text = str(value)
    curve = re.fullmatch(r"(cosine|sine|linear|reverse_linear|zeros)(?:\+([\d.]+))?", text.strip())
    if not curve:
        found = [number(item) if item.strip() else 0.0 for item in text.split(",")][:count]
        return found + [1.0] * (count - len(found))
    shape = {"sine": lambda x: math.sin(math.pi * x / 2), "cosine": lambda x: math.sin(math.pi * (1 - x) / 2),
             "linear": lambda x: x, "reverse_linear": lambda x: 1 - x, "zeros": lambda x: 0.0}[curve[1]]
    return [shape(index / (count - 1)) + number(curve[2] or 0) for index in range(count)]


def prompts_of(text: str) -> list[dict[str, Any]]:
    """Lines of `a cat --n blurry --s 20 --l 7`, as sd-scripts' own table form names them."""
    found = []
    for line in text.splitlines():
        words, *flags = line.strip().split(" --")
        if not words or words.startswith("#"):
            continue
        prompt: dict[str, Any] = {"prompt": words}
        for flag in flags:
            for pattern, key, read in ((r"n (.+)", "negative_prompt", str), (r"s (\d+)", "sample_steps", whole),
                                       (r"l ([\d.]+)", "scale", number)):
                if match := re.match(pattern, flag, re.IGNORECASE):
                    prompt[key] = read(match[1])
        found.append(prompt)
    return found
