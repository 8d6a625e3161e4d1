"""Hosts the dashboard in a terminal until the run ends or the person leaves.

Only reads the run directory; what it asks of the engine goes through control/, so leaving, a lost
connection or a crash here never touches the run.
"""

import os
import subprocess
import sys
import time
from dataclasses import dataclass, field

from rich.console import Console
from rich.live import Live
from rich.text import Text

from crumb.engine.run.control import request
from crumb.engine.run.directory import HEARTBEAT_S, RunDirectory, engine_is_alive, read_state
from crumb.engine.run.events import read_events
from crumb.profiles.errors import CrumbError
from crumb.profiles.plan import load_plan
from crumb.wizard.dashboard.health import ENDED, health
from crumb.wizard.dashboard.panels import RunFacts
from crumb.wizard.dashboard.pictures import can_show_pictures, half_blocks
from crumb.wizard.dashboard.plain import PlainLines, say
from crumb.wizard.dashboard.state import DashboardState, clean, fold
from crumb.wizard.dashboard.terminal import Keys, counted_interrupts, single_keys
from crumb.wizard.dashboard.view import KEYS, SIDE_COLUMN, WIDE, render

POLL_S = 0.25
REDRAW_S = 1.0
"""A full screen is some kilobytes, and many watch over SSH."""

LINES_BESIDE_PICTURE = 26
"""Lines of a wide screen that the numbers, the events and the head take from a sample picture."""

CONFIRM_S = 5.0
NUM_LOG_LINES = 15
LEFT_AT_ONCE = 130
"""What shells use for a command ended by Ctrl-C."""

EXIT_CODES = {"finished": 0, "done": 0, "failed": 1, "lost": 1, "refused": 2, "stopped": 3, "new": 2}


def watch(run: RunDirectory, *, process: subprocess.Popen | None = None, plain: bool = False, ascii: bool = False,
          stop_on_interrupt: bool = False) -> int:
    """Shows the run until it ends or the person leaves; returns the exit code of the command.

    process: the engine where it is our child. stop_on_interrupt: Ctrl-C asks the engine to stop and
    save, instead of only leaving.
    """
    follower = Follower(run, process)
    plain = plain or not sys.stdout.isatty() or os.environ.get("TERM", "dumb") in ("dumb", "unknown", "")
    ascii = ascii or not (sys.stdout.encoding or "").lower().startswith("utf")
    with counted_interrupts() as interrupts, single_keys() as keys:
        host = Host(follower, keys, interrupts, stop_on_interrupt, ascii)
        try:
            return host.plain_lines() if plain else host.full_screen()
        except BrokenPipeError:
            # The reader of our lines has gone (`| head`); what is still buffered has nowhere to go.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0


@dataclass
class Follower:
    """Reads on in events.jsonl and state.json, and knows when nothing more will come."""

    run: RunDirectory
    process: subprocess.Popen | None
    state: DashboardState = field(default_factory=DashboardState)
    run_state: dict = field(default_factory=dict)
    offset: int = 0
    _speaks_of_former_life: bool | None = None

    def read(self) -> tuple[list[dict], bool]:
        """New events, not folded yet, and whether the run has ended before they were read."""
        ended = self._look()
        events, self.offset = read_events(self.run.events, self.offset)
        return events, ended

    def _look(self) -> bool:
        """Refreshes run_state; True when no engine works on the run any more."""
        alive = self.process.poll() is None if self.process else engine_is_alive(self.run)
        self.run_state = read_state(self.run)
        status = self.run_state["state"]
        if alive:
            if self._speaks_of_former_life or (status in ENDED and not self.state.outcome):
                # A resumed engine has not spoken yet: what the files say is about the one before it.
                self.run_state["state"] = "preparing"
            return False
        if self.process or (status in ENDED and status != "lost"):
            return True
        # Over a network mount the lock may be out of sight; the heartbeat tells more there.
        if time.time() - self.run_state.get("heartbeat", 0.0) < 2 * HEARTBEAT_S:
            self.run_state["state"] = "training"
            return False
        return True

    def folded(self) -> None:
        """To be called when the events are folded: an end found on the first read is that of an earlier engine."""
        self._speaks_of_former_life = bool(self.state.outcome) and self._speaks_of_former_life is not False

    def exit_code(self) -> int:
        if self.process and self.process.returncode is not None:
            return self.process.returncode if self.process.returncode >= 0 else 1
        code = self.run_state.get("exit_code")
        return code if isinstance(code, int) else EXIT_CODES.get(self.run_state["state"], 1)

    def facts(self) -> RunFacts:
        try:
            plan = load_plan(self.run.plan)
            trigger, vram_gib = plan.trigger, plan.vram_gib or None
        except CrumbError:
            trigger, vram_gib = "", None
        result = self.run.path / self.state.result if self.state.result else self.run.result
        try:
            num_bytes = result.stat().st_size
        except OSError:
            num_bytes = None
        return RunFacts(clean(result), num_bytes, trigger, vram_gib)


class Host:
    """One watching: the follower, what the person presses, and where it is shown."""

    def __init__(self, follower: Follower, keys: Keys, interrupts: list[int], stop_on_interrupt: bool, ascii: bool):
        self.follower, self.keys, self.interrupts = follower, keys, interrupts
        self.run, self.state = follower.run, follower.state
        self.stop_on_interrupt, self.ascii = stop_on_interrupt, ascii
        self.facts = follower.facts()
        self.idle_line, self.message, self.message_until = KEYS, "", 0.0
        self.stop_asked_at = -CONFIRM_S
        self._picture: tuple[str, Text | None] = ("", None)

    def plain_lines(self) -> int:
        lines = PlainLines(self.state)
        if self.keys.descriptor is not None:
            say(f"keys: {KEYS}")
        while True:
            events, ended = self.follower.read()
            lines.follow(events)
            self.follower.folded()
            if ended:
                return self._print_end(plain=True)
            left = self._react(self.keys.wait(POLL_S))
            if self.message:
                say(self.message)
                self.message = ""
            if left is not None:
                self._say_goodbye()
                return left

    def full_screen(self) -> int:
        console = Console()
        drawn_at, drawn_as, left = -REDRAW_S, None, None
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while left is None:
                events, ended = self.follower.read()
                fold(self.state, events)
                self.follower.folded()
                if ended:
                    break
                now, looks = time.monotonic(), (console.size, self._keys_line())
                if now - drawn_at >= REDRAW_S or looks != drawn_as:
                    live.update(self._view(console), refresh=True)
                    drawn_at, drawn_as = now, looks
                left = self._react(self.keys.wait(POLL_S))
        if left is not None:
            self._say_goodbye()
            return left
        return self._print_end(plain=False)

    def _view(self, console: Console):
        width, height = console.size
        return render(self.state, self.follower.run_state, self.run.name, width, height, self.ascii,
                      facts=self.facts, keys=self._keys_line(), picture=self._newest_picture(console))

    def _keys_line(self) -> str:
        return self.message if time.monotonic() < self.message_until else self.idle_line

    def _newest_picture(self, console: Console) -> Text | None:
        if console.width < WIDE or not can_show_pictures(console, self.ascii):
            return None
        path = next((paths[0] for _, paths in reversed(self.state.samples) if paths), "")
        if path != self._picture[0]:
            whole = self.run.path / path
            max_lines = console.height - LINES_BESIDE_PICTURE
            drawn = half_blocks(whole, SIDE_COLUMN - 2, max_lines) if whole.is_file() and max_lines >= 6 else None
            self._picture = (path, drawn)
        return self._picture[1]

    def _react(self, pressed: str) -> int | None:
        """Does what keys and signals ask; an exit code when the person leaves."""
        if self.interrupts:
            if not self.stop_on_interrupt:
                return 0
            if len(self.interrupts) > 1:
                return LEFT_AT_ONCE
            if self.idle_line == KEYS:
                self._stop("Ctrl-C again leaves at once")
        for key in pressed:
            if key == "q":
                return 0
            if key == "p":
                self._ask("sample", "Sample pictures are asked for: they come after this step")
            elif key == "s":
                self._ask("save", "A checkpoint is asked for: it comes after this step")
            elif key == "x":
                self._confirm_stop()
        return None

    def _confirm_stop(self) -> None:
        if time.monotonic() - self.stop_asked_at < CONFIRM_S:
            self._stop("q leaves")
            return
        self.stop_asked_at = time.monotonic()
        self._tell(f"Press x again within {CONFIRM_S:.0f} s to save and stop the training", CONFIRM_S)

    def _stop(self, how_to_leave: str) -> None:
        self.idle_line = f"Stopping: the engine ends this step and saves ({how_to_leave})"
        self._ask("stop", self.idle_line)

    def _ask(self, what: str, answer: str, seconds: float = CONFIRM_S) -> None:
        try:
            request(self.run, what)
        except OSError as error:
            answer, seconds = f"This can't be asked for: {error.strerror}, {self.run.control}", CONFIRM_S
        self._tell(answer, seconds)

    def _tell(self, message: str, seconds: float) -> None:
        self.message, self.message_until = message, time.monotonic() + seconds

    def _say_goodbye(self) -> None:
        print(f"Training goes on. Attach again with: crumb watch {self.run.name}", flush=True)

    def _print_end(self, plain: bool) -> int:
        """The last view, on the main screen where it stays; the log where the engine left no word."""
        self.facts, code = self.follower.facts(), self.follower.exit_code()
        words = health(self.state, self.follower.run_state, time.time(), self.run.name)
        if words.startswith(("running", "no ")):
            # Our child is gone while state.json still tells of work: it had no time to say so.
            self.follower.run_state["state"], words = "lost", "process gone"
        if plain:
            self._print_plain_result(words)
        else:
            console = Console()
            console.print(render(self.state, self.follower.run_state, self.run.name, console.width,
                                 min(console.height - 2, 26), self.ascii, facts=self.facts, keys=""))
        if not self.state.error and words.startswith(("process", "failed", "not")):
            self._print_log()
        return code

    def _print_plain_result(self, words: str) -> None:
        if words != "finished":
            say(words)
        else:
            say(f"LoRA file: {self.facts.result_path}")
            if self.facts.trigger:
                say(f"trigger: {self.facts.trigger}")
            say(f"ComfyUI: models/loras   A1111/Forge: models/Lora, <lora:{self.run.name}:1> in the prompt")
        if words.startswith(("process", "failed")):
            say(f"go on with: crumb resume {self.run.name}   full log: {self.run.log}")

    def _print_log(self) -> None:
        try:
            with self.run.log.open("rb") as file:
                file.seek(max(0, self.run.log.stat().st_size - 16_384))
                lines = file.read().decode(errors="replace").splitlines()[-NUM_LOG_LINES:]
        except OSError:
            return
        if lines:
            print(f"The last lines of {self.run.log}:")
        encoding = sys.stdout.encoding or "utf-8"
        for line in lines:
            print("  " + clean(line).encode(encoding, "backslashreplace").decode(encoding), flush=True)
