"""The full-screen wizard: what its screens share (answers, what is known of the files, the draft) and the way on.

Separate from the screens, which only ask and show; import it after `terminal.set_up_textual`.
"""

import sys
from dataclasses import replace
from typing import Any, ClassVar

from textual.app import App

from crumb.engine.run.directory import RunDirectory
from crumb.profiles.answers import Answers
from crumb.wizard.draft import save_draft
from crumb.wizard.questions import TOPICS, Known, with_answer
from crumb.wizard.screens.ask import AskScreen
from crumb.wizard.screens.dialogs import ConfirmDialog
from crumb.wizard.screens.review import ReviewScreen
from crumb.wizard.screens.welcome import WelcomeScreen


class Wizard(App[int]):
    """Screens lie on a stack: Esc takes one off, and no answer is lost by it."""

    TITLE = "crumb"
    CSS_PATH = "app.tcss"
    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar = [("f10", "leave", "Quit")]

    def __init__(self, ascii: bool = False):
        super().__init__()
        self.ascii = ascii
        self.answers = Answers()
        self.known = Known()
        self.parting_words = ""
        if ascii:
            self.add_class("-ascii")

    def on_mount(self) -> None:
        self.push_screen(WelcomeScreen())

    def begin(self, answers: Answers, topic: str = "goal") -> None:
        """Opens the interview with these answers; the steps before `topic` lie under it, for Esc."""
        self.answers, self.known = answers, Known()
        topics = list(TOPICS)
        for earlier in topics[: topics.index(topic) + 1 if topic in topics else 1]:
            self.push_screen(AskScreen(earlier) if earlier != "review" else ReviewScreen())

    def go_on(self, topic: str) -> None:
        """From one step to the next."""
        following = list(TOPICS)[list(TOPICS).index(topic) + 1]
        save_draft(self.answers, following)
        self.push_screen(ReviewScreen() if following == "review" else AskScreen(following))

    def answer(self, key: str, value: Any, topic: str) -> None:
        """Takes an answer and has it on disk before anything else happens."""
        if getattr(self.answers, key) == value:
            return
        self.answers = with_answer(self.answers, key, value)
        save_draft(self.answers, topic)

    def learn(self, **facts) -> None:
        self.known = replace(self.known, **facts)

    def show_run(self, run: RunDirectory, process=None) -> None:
        from crumb.wizard.screens.run import RunScreen

        self.push_screen(RunScreen(run, process))

    def show_started_run(self, run: RunDirectory, process) -> None:
        """The dashboard in place of the interview, which is over."""
        self.back_to_welcome()
        self.answers, self.known = Answers(), Known()
        self.show_run(run, process)

    def back_to_welcome(self) -> None:
        while not isinstance(self.screen, WelcomeScreen):
            self.pop_screen()

    def leave_with(self, words: str, code: int = 0) -> None:
        self.parting_words = words
        self.exit(code)

    def action_leave(self) -> None:
        if isinstance(self.screen, ConfirmDialog):
            return

        def decide(yes: bool | None) -> None:
            if yes:
                self.exit(0)

        self.push_screen(ConfirmDialog("Leave crumb?", "Answers given so far are kept, and no run is touched."), decide)


def run_wizard(ascii: bool) -> int:
    """Runs the wizard to its end; without the mouse, so that the terminal's own copying works."""
    wizard = Wizard(ascii)
    code = wizard.run(mouse=False)
    if wizard.parting_words:
        print(wizard.parting_words)
    sys.stdout.flush()
    return wizard.return_code or code or 0
