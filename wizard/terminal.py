"""What the terminal can do, judged before Textual is imported: it reads its environment only once.

Facts behind the choices: Textual starts even on TERM=dumb and then writes true-colour codes; NO_COLOR alone gives
greys; an encoding other than UTF-8 shows escapes in place of every line.
"""

import os
import shutil
import sys

MIN_SIZE = (80, 24)
"""Columns and rows the wizard is laid out for."""


def refusal() -> str | None:
    """Why the full-screen wizard can't run here, with the way out; None where it can."""
    if os.environ.get("TERM", "dumb") in ("dumb", "unknown", ""):
        return ("This terminal can't place the cursor (TERM is "
                f"{os.environ.get('TERM') or 'not set'}). Answer line by line instead: crumb --plain")
    encoding = (sys.stdout.encoding or "").lower().replace("-", "")
    if encoding != "utf8":
        return (f"This terminal's encoding is {sys.stdout.encoding}, and the wizard needs UTF-8. "
                f"Run `export LC_ALL=C.UTF-8` and start again, or answer line by line: crumb --plain")
    return None


def set_up_textual() -> None:
    """Settings for Textual; a person's own in the environment win."""
    os.environ.setdefault("TEXTUAL_ANIMATIONS", "none")
    if over_ssh():
        os.environ.setdefault("TEXTUAL_FPS", "10")
        os.environ.setdefault("TEXTUAL_SMOOTH_SCROLL", "0")
    if os.environ.get("NO_COLOR"):
        os.environ.setdefault("TEXTUAL_THEME", "ansi-dark")


def over_ssh() -> bool:
    return any(os.environ.get(name) for name in ("SSH_CONNECTION", "SSH_TTY", "MOSH_CONNECTION"))


def num_colours() -> int:
    """Colours the terminal says it has, by the words terminals use."""
    if os.environ.get("NO_COLOR"):
        return 0
    if os.environ.get("COLORTERM", "").lower() in ("truecolor", "24bit"):
        return 2**24
    return 256 if "256" in os.environ.get("TERM", "") else 16


def describe() -> str:
    """One line: kind, colours, size, over SSH or not."""
    colours = {0: "no colour", 16: "16 colours", 256: "256 colours", 2**24: "true colour"}[num_colours()]
    columns, rows = shutil.get_terminal_size()
    return f"{os.environ.get('TERM') or 'no TERM'}, {colours}, {columns}x{rows}{', over SSH' if over_ssh() else ''}"
