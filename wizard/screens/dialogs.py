"""Small windows over a screen: a message, a question with a harmless default, and changing one setting."""

from collections.abc import Callable
from typing import Any, ClassVar

from textual.app import ComposeResult
from textual.containers import Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Input, Static

from crumb.profiles.errors import RequestError


class Dialog(ModalScreen):
    """What the windows share: a title, text that scrolls, a line of keys."""

    def __init__(self, title: str, text: str):
        super().__init__()
        self.dialog_title = title
        self.text = text

    def compose(self) -> ComposeResult:
        with Vertical():
            yield Static(self.dialog_title, classes="title", markup=False)
            with VerticalScroll(classes="scroll"):
                yield Static(self.text, classes="text", markup=False)
            yield from self.compose_controls()

    def compose_controls(self) -> ComposeResult:
        yield Static("Enter or Esc: close", classes="keys")


class MessageDialog(Dialog):
    """Says one thing."""

    BINDINGS: ClassVar = [("enter,escape,f1,f3,q", "dismiss(None)", "Close")]


class ConfirmDialog(Dialog):
    """True only on `y`: Enter and Esc keep everything as it is."""

    BINDINGS: ClassVar = [("y", "dismiss(True)", "Yes"), ("n,enter,escape", "dismiss(False)", "No")]

    def compose_controls(self) -> ComposeResult:
        yield Static("y: yes     n, Enter or Esc: no", classes="keys")


class SettingDialog(Dialog):
    """Changes one setting: gives the new value, None for no change, or DERIVED to go back to the derived one.

    `check` turns the text into the value or raises RequestError.
    """

    BINDINGS: ClassVar = [("escape", "dismiss(None)", "Back")]
    DERIVED = object()

    def __init__(self, name: str, text: str, present: str, check: Callable[[str], Any]):
        super().__init__(name, text)
        self.present = present
        self.check = check

    def compose_controls(self) -> ComposeResult:
        yield Input(self.present, compact=True)
        yield Static("", classes="error", markup=False)
        yield Static("Enter: take it   empty: derived again   Esc: leave it as it was", classes="keys")

    def on_mount(self) -> None:
        self.query_one(Input).focus()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        if not event.value.strip():
            self.dismiss(self.DERIVED)
            return
        try:
            value = self.check(event.value.strip())
        except RequestError as error:
            self.query_one(".error", Static).update(f"! {error}")
            return
        self.dismiss(value)
