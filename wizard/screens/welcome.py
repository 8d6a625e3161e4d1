"""The first screen: a new LoRA, the draft, a run that is going on, or the runs of the past."""

import time
from typing import ClassVar

from textual.app import ComposeResult
from textual.screen import Screen
from textual.widgets import Footer, OptionList, Static
from textual.widgets.option_list import Option

from crumb.engine.run.directory import engine_is_alive, find_run, list_runs, read_state
from crumb.profiles.answers import Answers
from crumb.wizard import terminal
from crumb.wizard.commands import age_in_words
from crumb.wizard.draft import Draft, load_draft
from crumb.wizard.screens.dialogs import MessageDialog

INTRO = "crumb trains SDXL LoRAs on small GPUs. It asks a few questions, shows every\nsetting with its reason, and starts."

HELP = {
    "new": "Five short steps. Every answer is kept the moment you give it.",
    "draft": "Your answers so far; go on where you were.",
    "runs": "See how they went, go on with one that stopped.",
}
MAX_RUNNING_SHOWN = 4


class WelcomeScreen(Screen):
    """Shown again whenever the person comes back to it, with what is true then."""

    BINDINGS: ClassVar = [("f1", "explain", "Help")]

    def compose(self) -> ComposeResult:
        yield Static("crumb", classes="head")
        yield Static(INTRO, id="intro")
        yield OptionList(id="menu", markup=False)
        yield Static("", id="menu-help", markup=False)
        yield Static("", id="machine", markup=False)
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        self.query_one("#machine", Static).update(f"Terminal: {terminal.describe()}{self._size_remark()}\nGPU: looking ...")
        self.run_worker(self._look_for_gpu, thread=True)

    def on_screen_resume(self) -> None:
        self.draft = load_draft()
        menu = self.query_one("#menu", OptionList)
        menu.clear_options()
        menu.add_options(self._options())
        menu.highlighted = 0
        menu.focus()

    def _options(self) -> list[Option]:
        options = []
        if self.draft:
            options.append(Option(f"  Go on with {draft_in_words(self.draft)}", id="draft"))
        options.append(Option("  New LoRA", id="new"))
        runs = list_runs()
        for run in [run for run in runs if engine_is_alive(run)][:MAX_RUNNING_SHOWN]:
            state = read_state(run)
            options.append(Option(f"  Watch {run.name}: {state['state']}, step {state.get('step', 0)} of "
                                  f"{state.get('steps', 0)}", id=f"watch {run.path}"))
        if runs:
            options.append(Option(f"  All runs ({len(runs)})", id="runs"))
        return options

    def on_option_list_option_highlighted(self, event: OptionList.OptionHighlighted) -> None:
        for option in event.option_list.options:  # a mark that shows without colour
            mark = ">" if option is event.option else " "
            event.option_list.replace_option_prompt(option.id, f"{mark} {str(option.prompt)[2:]}")
        words = HELP.get(event.option_id, "It goes on whether you watch or not.")
        self.query_one("#menu-help", Static).update(words)

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        if event.option_id == "new":
            self.app.begin(Answers())
        elif event.option_id == "draft":
            self.app.begin(self.draft.answers, self.draft.topic)
        elif event.option_id == "runs":
            from crumb.wizard.screens.runs import RunsScreen

            self.app.push_screen(RunsScreen())
        else:
            self.app.show_run(find_run(event.option_id.removeprefix("watch ")))

    def _look_for_gpu(self) -> None:
        from crumb.profiles.hardware import detect_gpu
        from crumb.wizard.facts import describe_gpu

        gpu = detect_gpu()
        words = describe_gpu(gpu, True)[0] if gpu else "none answers here; training would run on the processor"
        line = f"Terminal: {terminal.describe()}{self._size_remark()}\nGPU: {words}"
        self.app.call_from_thread(self.query_one("#machine", Static).update, line)

    def _size_remark(self) -> str:
        width, height = self.app.size
        wanted_width, wanted_height = terminal.MIN_SIZE
        if width >= wanted_width and height >= wanted_height:
            return ""
        return f"\n{wanted_width}x{wanted_height} needed, this is {width}x{height}: make it larger, or scroll"

    def action_explain(self) -> None:
        self.app.push_screen(MessageDialog("crumb", WELCOME_HELP))


WELCOME_HELP = (
    "Up and down choose, Enter takes. In the steps: Enter takes an answer, Tab or down goes to the next question, ctrl+n to "
    "the next step, Esc back, F1 explains, F10 leaves.\n\nA run is a process of its own: it goes on when you leave, close "
    "the terminal or lose the connection. Come back with `crumb` or `crumb watch`.\n\nTo see the whole road without any "
    "files of yours: crumb demo"
)


def draft_in_words(draft: Draft) -> str:
    """What the draft is about and how old it is."""
    about = draft.answers.name or draft.answers.trigger or draft.answers.subject
    return f"the draft {about!r} of {age_in_words(time.time() - draft.saved)} ago"
