"""The dashboard inside the wizard: the same picture as `crumb watch`, drawn anew once a second from the run's files."""

import subprocess
import time
from typing import ClassVar

from textual.app import ComposeResult
from textual.screen import Screen
from textual.widgets import Static

from crumb.engine.run.control import request
from crumb.engine.run.directory import RunDirectory, engine_is_alive, read_state
from crumb.wizard.dashboard.live import Follower
from crumb.wizard.dashboard.state import fold
from crumb.wizard.dashboard.view import render
from crumb.wizard.screens.dialogs import ConfirmDialog, MessageDialog

REFRESH_S = 1.0
ANSWER_S = 6.0
"""How long an answer to a key stands in the last line."""

RUNNING_KEYS = "q leave, training goes on   p pictures now   s save now   x stop   Esc menu"
ENDED_KEYS = "q leave   Esc menu   F1 help"
HELP = ("q or d leaves crumb; the run goes on. Esc goes to the menu; the run goes on. x asks it to stop after its present "
        "step, with everything saved. p makes sample pictures now, s saves a checkpoint now.\n\nThe curve is the loss "
        "smoothed; the dots are single steps. Lower is a closer fit, not a better LoRA: look at the sample pictures.")


class RunScreen(Screen):
    """Reads the run directory only; requests go in as files. Leaving never touches the run."""

    BINDINGS: ClassVar = [("q,d", "detach", ""), ("x", "stop", ""), ("p", "ask('sample')", ""), ("s", "ask('save')", ""),
                          ("escape", "menu", ""), ("f1,question_mark", "explain", "")]

    def __init__(self, run: RunDirectory, process: subprocess.Popen | None = None):
        super().__init__()
        self.run_directory = run
        self.follower = Follower(run, process)
        self.facts = self.follower.facts()
        self.answer, self.answer_until = "", 0.0

    def compose(self) -> ComposeResult:
        yield Static("", id="run")

    def on_mount(self) -> None:
        self.set_interval(REFRESH_S, self.draw)
        self.call_after_refresh(self.draw)

    def on_resize(self) -> None:
        self.draw()

    def draw(self) -> None:
        events, ended = self.follower.read()
        fold(self.follower.state, events)
        self.follower.folded()
        if ended:
            self.facts = self.follower.facts()
        keys = ENDED_KEYS if ended else RUNNING_KEYS
        if time.monotonic() < self.answer_until:
            keys = self.answer
        width, height = self.size
        self.query_one("#run", Static).update(
            render(self.follower.state, self.follower.run_state, self.run_directory.name, width, height, self.app.ascii,
                   facts=self.facts, keys=keys))

    def action_detach(self) -> None:
        name = self.run_directory.name
        if engine_is_alive(self.run_directory):
            self.app.leave_with(f"Training goes on. Attach again with: crumb watch {name}")
            return
        state = read_state(self.run_directory)["state"]
        words = f"The LoRA: {self.run_directory.result}" if state == "done" else f"Go on with it by: crumb resume {name}"
        self.app.leave_with(f"{name} is {state}. {words}", self.follower.exit_code())

    def action_menu(self) -> None:
        self.app.back_to_welcome()

    def action_ask(self, what: str) -> None:
        if engine_is_alive(self.run_directory):
            request(self.run_directory, what)
            self._answer({"sample": "Pictures after this step.", "save": "A checkpoint after this step.",
                          "stop": "It stops after this step and saves everything."}[what])
        else:
            self._answer("The run is not running.")

    def action_stop(self) -> None:
        if not engine_is_alive(self.run_directory):
            self._answer("The run is not running.")
            return

        def decide(yes: bool | None) -> None:
            if yes:
                self.action_ask("stop")

        self.app.push_screen(ConfirmDialog(
            f"Stop {self.run_directory.name}?",
            f"It finishes its step and saves everything. Go on later with: crumb resume {self.run_directory.name}"), decide)

    def action_explain(self) -> None:
        self.app.push_screen(MessageDialog("Dashboard", HELP))

    def _answer(self, words: str) -> None:
        self.answer, self.answer_until = words, time.monotonic() + ANSWER_S
        self.draw()
