"""The last step: every derived setting with its reason, what to look out for, and the start."""

import dataclasses
from dataclasses import replace
from typing import Any, ClassVar

from textual import work
from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.coordinate import Coordinate
from textual.screen import Screen
from textual.widgets import DataTable, Footer, Static

from crumb.engine.run.directory import create_run
from crumb.profiles.derivation import Derived
from crumb.profiles.errors import CrumbError, RequestError
from crumb.profiles.interview import ANSWERED, UNSETTABLE, Interview, check_override, conclude, default_name
from crumb.profiles.plan import plan_fields
from crumb.wizard.commands import engine_died, start_engine, unused_name
from crumb.wizard.dashboard.state import clean
from crumb.wizard.draft import drop_draft, save_draft
from crumb.wizard.planning import as_text, as_typed, equivalent_command, write_plan
from crumb.wizard.screens.ask import step_line
from crumb.wizard.screens.dialogs import ConfirmDialog, MessageDialog, SettingDialog

KEYS = ("Enter on a setting changes it; ctrl+n starts the run; F3 shows the warnings and the same plan as a command; F5 "
        "writes plan.toml without starting; Esc goes back to any answer. A changed setting is marked with `*`.")
VALUE_CELLS = 16


class ReviewScreen(Screen):
    """Nothing is started or written before ctrl+n."""

    BINDINGS: ClassVar = [("escape", "back", "Back"), ("ctrl+n", "start", "Start the run"), ("f3", "details", "Command"),
                          ("f5", "write", "Write plan"), ("f1", "explain", "Help")]

    def __init__(self):
        super().__init__()
        self.interview: Interview | None = None
        self.starting = False

    def compose(self) -> ComposeResult:
        yield Static(step_line("review"), classes="head")
        yield Static("Drawing up the plan ...", id="summary", markup=False)
        with VerticalScroll(id="warnings", can_focus=False):
            yield Static("", id="warning-lines", markup=False)
        yield DataTable(id="settings", cursor_type="row", zebra_stripes=False)
        yield Static("", id="why", markup=False)
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        self.query_one(DataTable).add_columns("  Setting", "Value", "Reason")
        self.query_one(DataTable).focus()
        self._conclude()

    def on_screen_resume(self) -> None:
        if self.interview and self.interview.answers != self._answers():
            self._conclude()

    def _answers(self):
        answers = self.app.answers
        return replace(answers, name=answers.name or unused_name(default_name(answers)))

    @work(thread=True, exclusive=True)
    def _conclude(self) -> None:
        try:
            interview = conclude(self._answers(), self.app.known.scan)
        except RequestError as error:
            self.app.call_from_thread(self._refuse, str(error))
            return
        self.app.call_from_thread(self._show, interview)

    def _refuse(self, sentence: str) -> None:
        if self.is_attached:
            self.query_one("#summary", Static).update(f"! {sentence}\nEsc goes back to the answers.")

    def _show(self, interview: Interview) -> None:
        if not self.is_attached:  # the person went back meanwhile
            return
        self.interview = interview
        self.app.learn(scan=interview.scan, base=interview.base)
        self.query_one("#summary", Static).update(summary(interview))
        warnings = [f"? {clean(warning['text'])}" for warning in interview.derivation.warnings]
        self.query_one("#warning-lines", Static).update("\n".join(warnings))
        table = self.query_one(DataTable)
        row = table.cursor_row
        table.clear()
        for name, derived in rows_of(interview).items():
            mark = "*" if name in interview.answers.overrides else " "
            value = as_text(derived.value)
            shown = value if len(value) <= VALUE_CELLS else value[: VALUE_CELLS - 2] + ".."
            table.add_row(f"{mark} {name}", clean(shown), derived.reason, key=name)
        table.cursor_coordinate = Coordinate(min(row, table.row_count - 1), 0)
        self._explain_row(str(table.coordinate_to_cell_key(table.cursor_coordinate).row_key.value))

    def on_data_table_row_highlighted(self, event: DataTable.RowHighlighted) -> None:
        if self.interview and event.row_key.value:
            self._explain_row(event.row_key.value)

    def _explain_row(self, name: str) -> None:
        derived = rows_of(self.interview)[name]
        rule = f" [{derived.rule}]" if derived.rule else ""
        setting = plan_fields().get(name)
        help = f"{setting.metadata['help']}.\n" if setting else ""
        self.query_one("#why", Static).update(f"{help}{name} = {clean(as_text(derived.value))}: {derived.reason}{rule}")

    def on_data_table_row_selected(self, event: DataTable.RowSelected) -> None:
        name = event.row_key.value
        fixed = why_fixed(name)
        derived = rows_of(self.interview)[name]
        if fixed:
            self.app.push_screen(MessageDialog(name, f"{as_text(derived.value)}: {derived.reason}\n\n{fixed}"))
            return

        def take(value: Any) -> None:
            if value is None:
                return
            kept = {key: item for key, item in self.app.answers.overrides.items() if key != name}
            overrides = kept if value is SettingDialog.DERIVED else {**kept, name: value}
            self.app.answers = replace(self.app.answers, overrides=overrides)
            save_draft(self.app.answers, "review")
            self._conclude()

        help = setting_help(name, derived)
        self.app.push_screen(SettingDialog(name, help, as_typed(derived.value), self._checker(name)), take)

    def _checker(self, name: str):
        def check(text: str) -> Any:
            value = check_override(name, text)
            answers = self._answers()
            # The whole plan is drawn up with it, because some rules need more than one value.
            conclude(replace(answers, overrides={**answers.overrides, name: value}), self.app.known.scan)
            return value
        return check

    def action_start(self) -> None:
        if not self.interview or self.starting:
            return
        warnings = self.interview.derivation.warnings
        text = summary(self.interview)
        if warnings:
            text += "\n\nWith these warnings:\n" + "\n".join(f"? {clean(warning['text'])}" for warning in warnings)

        def decide(yes: bool | None) -> None:
            if yes:
                self.starting = True
                self.query_one("#summary", Static).update("Starting the engine ...")
                self._start()

        self.app.push_screen(ConfirmDialog(f"Start the run {self.interview.plan.name!r}?", text), decide)

    @work(thread=True, exclusive=True)
    def _start(self) -> None:
        interview = self.interview
        try:
            run = create_run(interview.plan.name, interview.toml())
            drop_draft()
            process = start_engine(run)
        except CrumbError as error:
            self.app.call_from_thread(self._failed_to_start, str(error))
            return
        if process.poll():
            self.app.call_from_thread(self._failed_to_start, engine_died(run, process.returncode))
            return
        self.app.call_from_thread(self._started, run, process)

    def _failed_to_start(self, sentence: str) -> None:
        self.starting = False
        self.query_one("#summary", Static).update(summary(self.interview))
        self.app.push_screen(MessageDialog("The run was not started", sentence))

    def _started(self, run, process) -> None:
        self.starting = False
        self.app.show_started_run(run, process)

    def action_write(self) -> None:
        if not self.interview:
            return
        from pathlib import Path

        path = Path("plan.toml").absolute()
        if path.exists():
            self.app.push_screen(MessageDialog("Not written", f"{path} exists already. Move it away first."))
            return
        try:
            write_plan(self.interview, path)
        except RequestError as error:
            self.app.push_screen(MessageDialog("Not written", str(error)))
            return
        self.app.push_screen(MessageDialog("Written", f"{path}\n\nStart it any time with:\ncrumb train plan.toml"))

    def action_details(self) -> None:
        if not self.interview:
            return
        warnings = "\n".join(f"? {clean(item['text'])}" for item in self.interview.derivation.warnings) or "No warnings."
        command = equivalent_command(self.interview.answers)
        self.app.push_screen(MessageDialog("Warnings, and the same plan as a command", f"{warnings}\n\n{command}"))

    def action_explain(self) -> None:
        self.app.push_screen(MessageDialog("Review", KEYS))

    def action_back(self) -> None:
        if not self.starting:
            self.app.pop_screen()


def rows_of(interview: Interview) -> dict[str, Derived]:
    """The derived values, then the settings of the plan that simply have their default or came from an answer."""
    rows = dict(interview.derivation.values)
    for setting in dataclasses.fields(interview.plan):
        if setting.name not in rows and not why_fixed(setting.name):
            rows[setting.name] = Derived(getattr(interview.plan, setting.name), "", "the default")
    return rows


def why_fixed(name: str) -> str:
    """Why a row can't be changed here, or ""."""
    if name in ANSWERED:
        return "It follows from an answer: go back with Esc and change that."
    if name in UNSETTABLE:
        return f"It can't be set: {UNSETTABLE[name]}."
    if name in ("peak_gib", "seconds_per_step"):
        return "It follows from the other settings."
    if name != "epochs" and name not in plan_fields():
        return "It is fixed or advice for other tools, not a setting of the run."
    return ""


def setting_help(name: str, derived: Derived) -> str:
    rule = f" [{derived.rule}]" if derived.rule else ""
    setting = plan_fields().get(name)
    if setting is None:
        what = "Times each picture's repeats are seen; gives the steps." if name == "epochs" else why_fixed(name)
        return f"{what}\n{derived.reason}{rule}"
    choices, low, high = (setting.metadata[key] for key in ("choices", "low", "high"))
    allowed = f"One of: {', '.join(map(str, choices))}." if choices else ""
    if low is not None:
        allowed = f"From {low:g} to {high:g}."
    return f"{setting.metadata['help']}. {allowed}\n{derived.reason}{rule}"


def summary(interview: Interview) -> str:
    """What will happen, with the arithmetic."""
    plan, values = interview.plan, interview.derivation.values
    num_checkpoints = plan.steps // plan.save_every if plan.save_every else 1
    where = interview.gpu.name if interview.gpu.vram_gib else "the processor"
    lines = [f"{clean(plan.name)}: {plan.steps} steps on {where}, rank {plan.rank}, {plan.optimizer}, "
             f"about {num_checkpoints} checkpoints"]
    if values["steps"].rule:
        lines.append(values["steps"].reason)
    if "peak_gib" in values:
        lines.append(f"by arithmetic about {values['peak_gib'].value:.1f} of {plan.vram_gib:g} GiB{_duration(interview)}")
    return "\n".join(lines)


def _duration(interview: Interview) -> str:
    """Seconds a step and minutes in all; nothing where the card's speed is not known."""
    plan, seconds = interview.plan, interview.derivation.values.get("seconds_per_step")
    if seconds is None:
        return ""
    minutes = seconds.value * plan.steps * plan.gradient_accumulation_steps / 60
    return f", {seconds.value:.2g} s a step, {minutes:.0f} minutes" if minutes < 120 else (
        f", {seconds.value:.2g} s a step, {minutes / 60:.1f} hours")
