"""The answers so far, on disk from the moment each is given: a terminal that dies takes nothing along."""

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path

from crumb.engine.run.directory import write_atomic
from crumb.profiles.answers import Answers
from crumb.profiles.paths import state_dir


@dataclass(frozen=True)
class Draft:
    """`topic` is the step the person was at; `saved` unix seconds."""

    answers: Answers
    topic: str
    saved: float


def save_draft(answers: Answers, topic: str) -> None:
    content = {"saved": time.time(), "topic": topic, "answers": dataclasses.asdict(answers)}
    write_atomic(_path(), json.dumps(content, indent=1, ensure_ascii=False).encode())


def load_draft() -> Draft | None:
    """The draft, or None where there is none or its file makes no sense."""
    try:
        content = json.loads(_path().read_text(encoding="utf-8"))
        known = {setting.name for setting in dataclasses.fields(Answers)}
        kept = {name: value for name, value in content["answers"].items() if name in known and _fits(name, value)}
        return Draft(Answers(**kept), str(content["topic"]), float(content["saved"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def drop_draft() -> None:
    _path().unlink(missing_ok=True)


def _fits(name: str, value) -> bool:
    """Whether a value read back is of its answer's type."""
    if name == "vram_gib":
        return value is None or isinstance(value, (int, float))
    return isinstance(value, type(getattr(Answers(), name)))


def _path() -> Path:
    return state_dir() / "draft.json"
