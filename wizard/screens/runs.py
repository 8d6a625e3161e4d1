"""All runs with their state: see one, go on with one that stopped."""

import time
from pathlib import Path
from typing import ClassVar

from textual import work
from textual.app import ComposeResult
from textual.screen import Screen
from textual.widgets import DataTable, Footer, Static

from crumb.engine.run.directory import RunDirectory, list_runs
from crumb.profiles.errors import CrumbError
from crumb.profiles.plan import load_plan
from crumb.profiles.preflight import preflight
from crumb.wizard.commands import age_in_words, check_resumable, engine_died, start_engine, summary
from crumb.wizard.dashboard.state import clean
from crumb.wizard.screens.dialogs import MessageDialog


class RunsScreen(Screen):
    """The newest first."""

    BINDINGS: ClassVar = [("escape", "app.pop_screen", "Back"), ("r", "resume", "Resume"), ("f5", "reload", "Read again")]

    def compose(self) -> ComposeResult:
        yield Static("crumb   Runs", classes="head")
        yield DataTable(id="runs", cursor_type="row")
        yield Static("Enter: see it    r: go on with it from its last checkpoint", id="why")
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        self.query_one(DataTable).add_columns("Run", "State", "Step", "Loss", "Changed", "Folder")

    def on_screen_resume(self) -> None:
        self.action_reload()
        self.query_one(DataTable).focus()

    def action_reload(self) -> None:
        table = self.query_one(DataTable)
        row = table.cursor_row
        table.clear()
        for run in list_runs():
            line = summary(run)
            loss = "-" if line["loss"] is None else f"{line['loss']:.4f}"
            table.add_row(clean(line["name"]), line["state"], f"{line['step']}/{line['steps']}", loss,
                          f"{age_in_words(time.time() - line['changed'])} ago", clean(str(run.path.parent)),
                          key=str(run.path))
        table.move_cursor(row=min(row, max(0, table.row_count - 1)))

    def on_data_table_row_selected(self, event: DataTable.RowSelected) -> None:
        self.app.show_run(RunDirectory(Path(event.row_key.value)))

    def action_resume(self) -> None:
        table = self.query_one(DataTable)
        if table.row_count:
            key = table.coordinate_to_cell_key(table.cursor_coordinate).row_key.value
            self.query_one("#why", Static).update("Checking the plan and starting the engine ...")
            self._resume(RunDirectory(Path(key)))

    @work(thread=True, exclusive=True)
    def _resume(self, run: RunDirectory) -> None:
        try:
            check_resumable(run)
            preflight(load_plan(run.plan), resumes=run.has_checkpoints)
            process = start_engine(run)
        except CrumbError as error:
            self.app.call_from_thread(self.app.push_screen, MessageDialog("Not started", str(error)))
            return
        if process.poll():
            words = engine_died(run, process.returncode)
            self.app.call_from_thread(self.app.push_screen, MessageDialog("Not started", words))
            return
        self.app.call_from_thread(self.app.show_run, run, process)
