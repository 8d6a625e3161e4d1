"""One step of the interview: its questions as fields, and what the named files turned out to hold."""

from pathlib import Path
from typing import ClassVar

from textual import on, work
from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.screen import Screen
from textual.widgets import Footer, Input, Static
from textual.worker import get_current_worker

from crumb.profiles.base_model import inspect_base_model
from crumb.profiles.dataset import scan_pictures
from crumb.profiles.errors import RequestError
from crumb.profiles.hardware import detect_gpu, resolve_gpu
from crumb.wizard.facts import describe_base, describe_gpu, describe_scan
from crumb.wizard.questions import TOPICS, open_point, questions_of
from crumb.wizard.screens.dialogs import MessageDialog
from crumb.wizard.screens.widgets import Choice, Field

LOOKED_UP = {"pictures": "images", "base": "base"}
"""The answer of a step that names files to look at, in a thread."""

SDXL_RESOLUTION = 1024


class AskScreen(Screen):
    """Enter accepts a field and goes on to the next; an answer is saved the moment it is accepted."""

    AUTO_FOCUS = None
    BINDINGS: ClassVar = [
        ("escape", "back", "Back"), ("ctrl+n", "next", "Next step"), ("f5", "rescan", "Read again"), ("f1", "explain", "Help"),
        ("up", "move(-1)", ""), ("down", "move(1)", ""),
    ]

    def __init__(self, topic: str):
        super().__init__()
        self.topic = topic
        self.looking_at = ""
        """The path that is being looked at, or was last."""

    def compose(self) -> ComposeResult:
        yield Static(step_line(self.topic), classes="head")
        with VerticalScroll(classes="body", can_focus=False):
            for question in questions_of(self.topic):
                yield Field(question, self.app.answers)
            yield Static("", id="facts", markup=False)
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        self._show_questions()
        self._visible()[0].control.focus()
        if self.topic == "hardware":
            self._show_hardware()
        looked_up = LOOKED_UP.get(self.topic)
        if looked_up and getattr(self.app.answers, looked_up):
            self._look(getattr(self.app.answers, looked_up))

    def check_action(self, action: str, parameters: tuple) -> bool:
        return action != "rescan" or self.topic == "pictures"

    def _visible(self) -> list[Field]:
        return [field for field in self.query(Field) if field.display]

    def _show_questions(self) -> None:
        for field in self.query(Field):
            field.display = field.question.when(self.app.answers, self.app.known)
            field.refresh_default(self.app.answers)

    @on(Choice.Changed)
    def _choice_changed(self, event: Choice.Changed) -> None:
        self._accept(self.query_one(f"#field-{event.choice.id}", Field))

    @on(Input.Blurred)
    def _field_left(self, event: Input.Blurred) -> None:
        if event.value or getattr(self.app.answers, event.input.id):
            self._accept(self.query_one(f"#field-{event.input.id}", Field))

    @on(Input.Submitted)
    @on(Choice.Submitted)
    def _field_submitted(self, event) -> None:
        control = event.input if isinstance(event, Input.Submitted) else event.choice
        field = self.query_one(f"#field-{control.id}", Field)
        was_known = self._is_known()
        if not self._accept(field):
            return
        fields = self._visible()
        if field is not fields[-1]:
            fields[fields.index(field) + 1].control.focus()
        elif was_known:  # otherwise the person first sees what the files hold
            self.action_next()

    def _accept(self, field: Field) -> bool:
        """Saves the field's answer, or shows what is wrong with it."""
        try:
            value = field.read(self.app.answers)
        except RequestError as error:
            field.show_error(str(error))
            return False
        field.show_error("")
        self.app.answer(field.question.key, value, self.topic)
        if field.question.key == LOOKED_UP.get(self.topic) and value != self.looking_at:
            self._look(value)
        if self.topic == "hardware":
            self._show_hardware()
        self._show_questions()
        return True

    def _is_known(self) -> bool:
        """Whether the files of this step have been looked at and are as they should be."""
        if self.topic == "pictures":
            return self.app.known.scan is not None
        return self.app.known.base is not None if self.topic == "base" else True

    def _look(self, path: str) -> None:
        self.looking_at = path
        self.app.learn(**({"scan": None} if self.topic == "pictures" else {"base": None}))
        self._say("Reading ...")
        if self.topic == "pictures":
            self._scan(path)
        else:
            self._inspect(path)

    @work(thread=True, exclusive=True, group="look")
    def _scan(self, path: str) -> None:
        worker = get_current_worker()

        def progress(done: int, total: int) -> None:
            if worker.is_cancelled:
                raise RequestError("another folder was named meanwhile")
            if done % 10 == 0:
                self.app.call_from_thread(self._say, f"Reading pictures: {done} of {total}")

        try:
            scan = scan_pictures(Path(path), progress)
        except RequestError as error:
            if not worker.is_cancelled:
                self.app.call_from_thread(self._cannot_use, str(error))
            return
        if not worker.is_cancelled:
            self.app.call_from_thread(self._found, scan=scan)

    @work(thread=True, exclusive=True, group="look")
    def _inspect(self, path: str) -> None:
        worker = get_current_worker()
        try:
            base = inspect_base_model(Path(path))
        except RequestError as error:
            if not worker.is_cancelled:
                self.app.call_from_thread(self._cannot_use, str(error))
            return
        if not worker.is_cancelled:
            self.app.call_from_thread(self._found, base=base)

    def _cannot_use(self, sentence: str) -> None:
        if not self.is_attached:  # the person went back meanwhile
            return
        field = self.query_one(f"#field-{LOOKED_UP[self.topic]}", Field)
        field.show_error(sentence)
        field.control.focus()
        self._say("")

    def _found(self, **facts) -> None:
        if not self.is_attached:
            return
        self.app.learn(**facts)
        self._show_questions()
        if self.topic == "pictures":
            base = self.app.known.base
            lines = describe_scan(self.app.known.scan, base.native_resolution if base else SDXL_RESOLUTION)
        else:
            lines = describe_base(self.app.known.base)
        point = open_point(self.topic, self.app.answers, self.app.known)
        if point:
            self.query_one(f"#{point[0]}").focus()
        else:
            lines.append("\nEnter or ctrl+n: next step")
        self._say("\n".join(lines))

    def _show_hardware(self) -> None:
        found = detect_gpu()
        lines = describe_gpu(found, True) if found else ["No NVIDIA card answers in this machine."]
        try:
            gpu = resolve_gpu(self.app.answers.gpu, self.app.answers.vram_gib)
        except RequestError:
            gpu = found
        if gpu and gpu != found:
            lines += ["", *describe_gpu(gpu, False)]
        self._say("\n".join(lines))

    def _say(self, text: str) -> None:
        if self.is_attached:
            self.query_one("#facts", Static).update(text)

    def action_next(self) -> None:
        for field in self._visible():
            if not self._accept(field):
                field.control.focus()
                return
        if not self._is_known():
            field = self.query_one(f"#field-{LOOKED_UP[self.topic]}", Field)
            field.control.focus()
            return
        point = open_point(self.topic, self.app.answers, self.app.known)
        if point:
            field = self.query_one(f"#field-{point[0]}", Field)
            field.show_error(point[1])
            field.control.focus()
            return
        self.app.go_on(self.topic)

    def action_back(self) -> None:
        focused = self._focused_field()
        if focused and not focused.check(self.app.answers):
            self._accept(focused)
        self.app.pop_screen()

    def action_move(self, by: int) -> None:
        fields, focused = self._visible(), self._focused_field()
        if focused in fields:
            fields[(fields.index(focused) + by) % len(fields)].control.focus()

    def action_rescan(self) -> None:
        if self._accept(self.query_one("#field-images", Field)):
            self._look(self.app.answers.images)

    def action_explain(self) -> None:
        field = self._focused_field() or self._visible()[0]
        self.app.push_screen(MessageDialog(field.question.title, f"{field.question.help}\n\n{field.question.more}\n\n{KEYS}"))

    def _focused_field(self) -> Field | None:
        return next((field for field in self.query(Field) if field.control is self.focused), None)


KEYS = ("Keys: Enter takes an answer; up, down and Tab move between questions; left and right move the mark of a choice; "
        "ctrl+n goes to the next step, Esc back. Answers are kept the moment they are taken.")


def step_line(topic: str) -> str:
    topics = list(TOPICS)
    return f"crumb   Step {topics.index(topic) + 1} of {len(topics)}   {TOPICS[topic]}"
