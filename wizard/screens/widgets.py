"""The controls of the question screens, readable without colour: a choice, a field around a question, path proposals."""

from pathlib import Path
from typing import Any, ClassVar

from rich.text import Text
from textual import events
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.message import Message
from textual.reactive import reactive
from textual.suggester import Suggester
from textual.widget import Widget
from textual.widgets import Input, Static

from crumb.profiles.answers import Answers
from crumb.profiles.errors import RequestError
from crumb.wizard.questions import Question, read_answer


class Choice(Widget, can_focus=True):
    """One of a few: `(x) this   ( ) that`. Left and right move the mark; Textual's own buttons differ in colour only."""

    BINDINGS: ClassVar = [("left", "move(-1)", ""), ("right,space", "move(1)", ""), ("enter", "submit", "")]
    index = reactive(0)

    class Changed(Message):
        def __init__(self, choice: "Choice"):
            super().__init__()
            self.choice = choice

    class Submitted(Changed):
        pass

    def __init__(self, choices: tuple[tuple[Any, str], ...], value: Any, **kwargs):
        super().__init__(**kwargs)
        self.choices = choices
        values = [choice for choice, _ in choices]
        self.set_reactive(Choice.index, values.index(value) if value in values else 0)

    @property
    def value(self) -> Any:
        return self.choices[self.index][0]

    def render(self) -> Text:
        text = Text()
        for number, (_, label) in enumerate(self.choices):
            chosen = number == self.index
            text.append(f"({'x' if chosen else ' '}) {label}", style="bold" if chosen else "")
            text.append("   ")
        return text

    def action_move(self, by: int) -> None:
        self.index = (self.index + by) % len(self.choices)
        self.post_message(self.Changed(self))

    def action_submit(self) -> None:
        self.post_message(self.Submitted(self))


class PathSuggester(Suggester):
    """Proposes the first folder or model file whose name goes on as typed."""

    def __init__(self, folders_only: bool):
        super().__init__(use_cache=False, case_sensitive=True)
        self.folders_only = folders_only

    async def get_suggestion(self, value: str) -> str | None:
        typed = Path(value).expanduser()
        folder, start = (typed, "") if value.endswith("/") else (typed.parent, typed.name)
        if not value or (not start and not value.endswith("/")):
            return None
        try:
            names = sorted(path.name for path in folder.iterdir() if path.name.startswith(start) and self._fits(path, start))
        except OSError:
            return None
        return value + names[0][len(start):] if names else None

    def _fits(self, path: Path, start: str) -> bool:
        if path.name.startswith(".") and not start.startswith("."):
            return False
        if path.is_dir():
            return True
        return not self.folders_only and path.suffix.lower() == ".safetensors"


class Field(Vertical):
    """One question with its control, help and error line. A `>` marks the one in focus."""

    def __init__(self, question: Question, answers: Answers):
        super().__init__(id=f"field-{question.key}")
        self.question = question
        self.answers = answers

    def compose(self) -> ComposeResult:
        question = self.question
        present = getattr(self.answers, question.key)
        yield Static(f"  {question.title}", classes="title", markup=False)
        if question.choices:
            default = question.default(self.answers)
            yield Choice(question.choices, default if present == "" else present, id=question.key)
        else:
            shown = f"{present:g}" if isinstance(present, float) else present or ""
            if shown == question.default(self.answers):  # stands as placeholder, so that typing replaces it
                shown = ""
            suggester = PathSuggester(folders_only=question.key == "images") if question.kind == "path" else None
            yield Input(shown, placeholder=str(question.default(self.answers)), compact=True, select_on_focus=False,
                        suggester=suggester, id=question.key)
        yield Static(question.help, classes="help", markup=False)
        yield Static("", classes="error", markup=False)

    @property
    def control(self) -> Choice | Input:
        return self.query_one(f"#{self.question.key}")

    def read(self, answers: Answers) -> Any:
        """The value as typed, checked. Raises RequestError."""
        text = self.control.value
        if isinstance(text, str) and not text and self.question.key == "gpu":
            text = Answers.gpu
        return read_answer(self.question, text, answers)

    def show_error(self, sentence: str) -> None:
        self.set_class(bool(sentence), "-wrong")
        self.query_one(".error", Static).update(f"! {sentence}" if sentence else "")
        if sentence:
            self.call_after_refresh(self.scroll_visible, animate=False)

    def check(self, answers: Answers) -> str:
        try:
            self.read(answers)
        except RequestError as error:
            return str(error)
        return ""

    def refresh_default(self, answers: Answers) -> None:
        """Defaults follow from other answers (the name from the trigger)."""
        if isinstance(self.control, Input):
            self.control.placeholder = str(self.question.default(answers))

    def on_descendant_focus(self, event: events.DescendantFocus) -> None:
        self.query_one(".title", Static).update(f"> {self.question.title}")
        self.call_after_refresh(self.scroll_visible, animate=False)

    def on_descendant_blur(self, event: events.DescendantBlur) -> None:
        self.query_one(".title", Static).update(f"  {self.question.title}")
