"""Keys and signals of the watching terminal, each put back as it was however the watching ends."""

import contextlib
import os
import re
import select
import signal
import sys
import termios
import threading
import tty
from collections.abc import Iterator

_ESCAPE = re.compile(r"\x1b(\[[0-9;?]*[ -/]*[@-~]|O.|.)?")
"""An arrow or function key comes as ESC and letters, none of which was meant."""


class Keys:
    """Single key presses; none where stdin is no terminal of ours, so that a pipe or `&` still works."""

    def __init__(self):
        self.descriptor: int | None = None

    def wait(self, seconds: float) -> str:
        """Printable keys pressed within `seconds`, lower case; returns at the first."""
        try:
            ready, _, _ = select.select([self.descriptor] if self.descriptor is not None else [], [], [], seconds)
            pressed = os.read(self.descriptor, 64) if ready else b""
        except OSError:
            # The terminal is gone (EIO after a hang-up); the run is not ours to end.
            self.descriptor, ready, pressed = None, [], b""
        if ready and not pressed:
            self.descriptor = None
        return _ESCAPE.sub("", pressed.decode(errors="ignore")).lower()


@contextlib.contextmanager
def single_keys() -> Iterator[Keys]:
    """Keys without Enter and without echo, as long as this lasts."""
    keys = Keys()
    descriptor = _foreground_stdin()
    if descriptor is None:
        yield keys
        return
    before = termios.tcgetattr(descriptor)
    try:
        tty.setcbreak(descriptor, termios.TCSANOW)
        modes = termios.tcgetattr(descriptor)
        # Ctrl-Z would leave the shell on the alternate screen.
        modes[6][termios.VSUSP] = os.fpathconf(descriptor, "PC_VDISABLE").to_bytes(1, "big")
        termios.tcsetattr(descriptor, termios.TCSANOW, modes)
        keys.descriptor = descriptor
        yield keys
    finally:
        with contextlib.suppress(termios.error):
            termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _foreground_stdin() -> int | None:
    try:
        descriptor = sys.stdin.fileno()
        if os.isatty(descriptor) and os.tcgetpgrp(descriptor) == os.getpgrp():
            return descriptor
    except (OSError, ValueError, AttributeError):
        pass
    return None


@contextlib.contextmanager
def counted_interrupts() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM in a list instead of dying of them; SIGHUP keeps its meaning."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before = {number: signal.signal(number, lambda signum, _frame: caught.append(signum))
              for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
