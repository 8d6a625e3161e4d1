import contextlib
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time

import pytest

from crumb.engine.run.directory import RunDirectory, engine_lock, write_state
from crumb.engine.run.events import EventWriter
from crumb.wizard.dashboard.live import watch

WATCH = ("import sys; from pathlib import Path; from crumb.engine.run.directory import RunDirectory;"
         "from crumb.wizard.dashboard.live import watch;"
         "sys.exit(watch(RunDirectory(Path(sys.argv[1])), stop_on_interrupt=sys.argv[2] == 'stop'))")


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    run = RunDirectory(tmp_path / "cat")
    for folder in (run.path, run.control, run.samples):
        folder.mkdir()
    return run


def write_history(run: RunDirectory, last: str | None, **more) -> None:
    events = EventWriter(run.events)
    events.emit("started", device="cpu", step=0, steps=100)
    events.emit("phase", phase="cache latents")
    for done in range(1, 31):
        events.emit("progress", phase="cache latents", done=done, total=30)
    events.emit("phase", phase="train")
    for step in range(1, 51):
        events.emit("step", step=step, epoch=1, loss=0.1, loss_smoothed=0.1, learning_rate=1e-4, seconds=0.5)
    events.emit("saved", step=50, path="checkpoints/step-000050", kind="checkpoint")
    events.emit("warning", text="a picture is small")
    if last:
        events.emit(last, **more)
    events.close()


@pytest.mark.parametrize(("last", "more", "state", "code", "words"), [
    ("finished", {"step": 100, "path": "cat.safetensors"}, {"state": "finished"}, 0, "cat.safetensors"),
    ("error", {"text": "disk full"}, {"state": "failed"}, 1, "error: disk full"),
    ("error", {"text": "no such base"}, {"state": "failed", "exit_code": 2}, 2, "error: no such base"),
    ("stopped", {"step": 50}, {"state": "stopped"}, 3, "resume with: crumb resume cat"),
    (None, {}, {"state": "training"}, 1, "process gone"),
])
def test_plain_lines_of_an_ended_run(run, capsys, monkeypatch, last, more, state, code, words):
    write_history(run, last, **more)
    write_state(run, step=50, steps=100, **state)
    monkeypatch.setattr("crumb.wizard.dashboard.live.HEARTBEAT_S", 0.0)
    run.log.write_text("".join(f"log line {number}\n" for number in range(40)))
    assert watch(run, plain=True) == code
    out = capsys.readouterr().out
    lines = [line[10:] for line in out.splitlines()]
    assert lines[:2] == ["started on cpu", "encoding pictures"] and words in out
    assert "\x1b" not in out and "warning: a picture is small" in lines
    assert "checkpoint saved: checkpoints/step-000050" in lines
    assert len([line for line in lines if line.startswith("encoding pictures ")]) == 1, "progress is thinned"
    steps = [line for line in lines if line.startswith("step ")]
    assert [int(re.match(r"step (\d+)/100", line)[1]) for line in steps] == [1, 10, 20, 30, 40, 50]
    assert "loss 0.1000 smoothed 0.1000  lr 1.00e-4  0.50 s/step" in steps[-1]
    assert ("log line 39" in out and "log line 24" not in out) == (last is None)


def test_an_engine_that_dies_at_once_leaves_its_last_words(run, capsys):
    run.log.write_text("Traceback\nImportError: no torch\x1b[2J\n")
    child = subprocess.Popen([sys.executable, "-c", "raise SystemExit(1)"])
    assert watch(run, process=child, plain=True) == 1
    out = capsys.readouterr().out
    assert "  ImportError: no torch [2J" in out and "\x1b" not in out


class Terminal:
    """A watcher in a pseudo terminal of 80x24."""

    def __init__(self, run: RunDirectory, mode: str):
        self.master, self.slave = pty.openpty()
        termios.tcsetwinsize(self.slave, (24, 80))
        self.modes_before = termios.tcgetattr(self.slave)
        environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", WATCH, str(run.path), mode], env=environment | {"TERM": "xterm-256color"},
            stdin=self.slave, stdout=self.slave, stderr=self.slave, start_new_session=True,
            preexec_fn=lambda: __import__("fcntl").ioctl(0, termios.TIOCSCTTY, 0))
        self.output = ""

    def read_until(self, words: str, seconds: float = 20.0) -> None:
        deadline = time.monotonic() + seconds
        while words not in self.output:
            assert time.monotonic() < deadline, f"{words!r} never came in:\n{self.output[-3000:]!r}"
            if select.select([self.master], [], [], 0.1)[0]:
                self.output += os.read(self.master, 65536).decode(errors="replace")

    def press(self, keys: str) -> None:
        self.output = ""
        os.write(self.master, keys.encode())

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture
def at_work(run):
    """A run whose engine (this process) holds the lock."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(engine_lock(run))
        write_history(run, None)
        write_state(run, state="training", step=50, steps=100)
        yield run


def test_keys_ask_the_engine_and_q_leaves_with_the_terminal_as_it_was(at_work):
    terminal = Terminal(at_work, "leave")
    try:
        terminal.read_until("step 50/100")
        assert "\x1b[?1049h" in terminal.output and not termios.tcgetattr(terminal.slave)[3] & termios.ICANON
        terminal.press("\x1b[A")
        terminal.press("p")
        terminal.read_until("Sample pictures are asked for")
        terminal.press("s")
        terminal.read_until("A checkpoint is asked for")
        terminal.press("x")
        terminal.read_until("Press x again")
        assert sorted(path.name for path in at_work.control.iterdir()) == ["sample", "save"], "one x must not stop"
        terminal.press("q")
        terminal.read_until("Training goes on. Attach again with: crumb watch cat")
        assert terminal.process.wait(10) == 0
        assert "\x1b[?1049l" in terminal.output and "\x1b[?25h" in terminal.output
        assert termios.tcgetattr(terminal.slave) == terminal.modes_before
    finally:
        terminal.close()


def test_ctrl_c_of_crumb_train_stops_the_run_and_watches_on_to_its_end(at_work):
    terminal = Terminal(at_work, "stop")
    try:
        terminal.read_until("step 50/100")
        terminal.press("\x03")
        terminal.read_until("Stopping: the engine ends this step and saves")
        assert (at_work.control / "stop").exists() and terminal.process.poll() is None
        terminal.press("\x03")
        terminal.read_until("crumb watch cat")
        assert terminal.process.wait(10) == 130
        assert termios.tcgetattr(terminal.slave) == terminal.modes_before
    finally:
        terminal.close()


def test_the_last_view_stays_on_the_main_screen_and_the_code_is_that_of_the_run(run):
    with engine_lock(run):
        write_history(run, None)
        write_state(run, state="training", step=50, steps=100)
        terminal = Terminal(run, "stop")
        try:
            terminal.read_until("step 50/100")
            os.kill(terminal.process.pid, signal.SIGTERM)
            terminal.read_until("Stopping")
        except BaseException:
            terminal.close()
            raise
        events = EventWriter(run.events)
        events.emit("stopped", step=50)
        events.close()
        write_state(run, state="stopped", step=50, steps=100, exit_code=3)
    try:
        terminal.read_until("crumb resume cat")
        assert terminal.process.wait(10) == 3
        after_screen = terminal.output.split("\x1b[?1049l")[1]
        assert "what happened" in after_screen and "Stopped on request" in after_screen
    finally:
        terminal.close()
