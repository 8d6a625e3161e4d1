"""The full-screen wizard by keys alone, at 80x24: from the first screen to a finished LoRA, and the ways around it."""

import shutil
import time

import pytest
from textual.widgets import DataTable, Input, OptionList, Static

from crumb.engine.run.directory import RunDirectory, read_state
from crumb.wizard.app import Wizard
from crumb.wizard.draft import drop_draft, load_draft
from crumb.wizard.screens.ask import AskScreen
from crumb.wizard.screens.dialogs import ConfirmDialog, MessageDialog, SettingDialog
from crumb.wizard.screens.review import ReviewScreen
from crumb.wizard.screens.run import RunScreen
from crumb.wizard.screens.welcome import WelcomeScreen

SIZE = (80, 24)


@pytest.fixture(autouse=True)
def clean_draft(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    drop_draft()
    yield
    drop_draft()


async def until(pilot, condition, seconds=30.0, what=""):
    """Waits for what a thread brings."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:g} s in vain: {what}\n{screen_text(pilot.app)}"
        await pilot.pause(0.05)
    await pilot.pause()


def screen_text(app) -> str:
    """What stands on the screen, as text."""
    return "\n".join("".join(segment.text for segment in line) for line in app.screen._compositor.render_strips())


async def type_text(pilot, text):
    pilot.app.screen.focused.value = text
    await pilot.pause()


async def press(pilot, *keys):
    for key in keys:
        await pilot.press(key)
        await pilot.pause()


async def to_pictures(pilot, trigger="ohwx"):
    await press(pilot, "enter")
    assert isinstance(pilot.app.screen, AskScreen)
    await press(pilot, "enter", "enter")
    await type_text(pilot, trigger)
    await press(pilot, "enter", "enter")
    assert pilot.app.screen.topic == "pictures"


async def to_review(pilot, pictures, base):
    await to_pictures(pilot)
    await type_text(pilot, str(pictures))
    await press(pilot, "enter")
    await until(pilot, lambda: pilot.app.known.scan, what="scan")
    await press(pilot, "enter")
    await type_text(pilot, str(base))
    await press(pilot, "enter")
    await until(pilot, lambda: pilot.app.known.base, what="base")
    await press(pilot, "enter")
    await type_text(pilot, "cpu")
    await press(pilot, "enter", "enter")
    await until(pilot, lambda: isinstance(pilot.app.screen, ReviewScreen) and pilot.app.screen.interview, what="review")


async def set_value(pilot, name, text):
    table = pilot.app.screen.query_one(DataTable)
    before = pilot.app.screen.interview
    table.move_cursor(row=table.get_row_index(name))
    await press(pilot, "enter")
    assert isinstance(pilot.app.screen, SettingDialog)
    await type_text(pilot, text)
    await press(pilot, "enter")
    await until(pilot, lambda: isinstance(pilot.app.screen, ReviewScreen) and pilot.app.screen.interview is not before,
                what=f"{name} = {text}")


async def test_from_the_first_screen_to_a_finished_lora(photographs, tiny_base, tmp_path):
    app = Wizard()
    async with app.run_test(size=SIZE) as pilot:
        await to_review(pilot, photographs, tiny_base)
        assert load_draft().topic == "review"
        for name, text in (("steps", "4"), ("rank", "4"), ("sample_every", "0"), ("sample_prompts", "[]")):
            await set_value(pilot, name, text)
        table = app.screen.query_one(DataTable)
        assert str(table.get_row("rank")[0]) == "* rank" and str(table.get_row("alpha")[1]) == "2"
        await press(pilot, "ctrl+n")
        assert isinstance(app.screen, ConfirmDialog)
        await press(pilot, "y")
        await until(pilot, lambda: isinstance(app.screen, RunScreen), 60, "start")
        run = RunDirectory(tmp_path / "runs" / "ohwx")
        await until(pilot, lambda: read_state(run)["state"] not in ("preparing", "training", "sampling", "saving"), 120, "end")
        assert read_state(run)["state"] == "done", run.log.read_text()
        await until(pilot, lambda: "finished" in screen_text(app), 10, "the dashboard says finished")
        assert run.result.is_file()
        assert load_draft() is None
        await press(pilot, "q")
    assert app.return_code == 0 and str(run.result) in app.parting_words


async def test_a_wrong_answer_keeps_its_text_and_says_why(photographs, tmp_path):
    app = Wizard()
    async with app.run_test(size=SIZE) as pilot:
        await to_pictures(pilot)
        await type_text(pilot, "/no/such/folder")
        await press(pilot, "ctrl+n")
        assert app.screen.topic == "pictures" and "! There is no folder /no/such/folder" in screen_text(app)
        assert app.screen.query_one("#images", Input).value == "/no/such/folder"

        shutil.copytree(photographs, tmp_path / "set")
        (tmp_path / "set/coffee.jpg").write_bytes(b"cut")
        await type_text(pilot, str(tmp_path / "set"))
        await press(pilot, "enter")
        await until(pilot, lambda: app.known.scan, what="scan")
        assert "! coffee.jpg: It is no picture" in screen_text(app)
        await press(pilot, "ctrl+n")
        assert "Say yes to leave them out" in screen_text(app)
        await press(pilot, "right", "ctrl+n")
        assert app.screen.topic == "base" and app.answers.skip_broken
        await press(pilot, "f1")
        assert isinstance(app.screen, MessageDialog)
        await press(pilot, "escape", "escape")
        assert app.screen.topic == "pictures", "Esc goes back one step"


async def test_a_killed_terminal_loses_nothing(photographs):
    first = Wizard()
    async with first.run_test(size=SIZE) as pilot:
        await to_pictures(pilot, trigger="mylena")
        await type_text(pilot, str(photographs))
        await press(pilot, "enter")
    second = Wizard()
    async with second.run_test(size=SIZE) as pilot:
        await pilot.pause()
        assert isinstance(second.screen, WelcomeScreen)
        assert second.screen.query_one(OptionList).options[0].id == "draft"
        assert "> Go on with the draft 'mylena'" in screen_text(second)
        await press(pilot, "enter")
        assert second.screen.topic == "pictures"
        await until(pilot, lambda: second.known.scan, what="the folder of the draft is read again")
        assert second.screen.query_one("#images", Input).value == str(photographs)
        await press(pilot, "escape")
        assert second.screen.topic == "goal"
        assert second.screen.query_one("#trigger", Input).value == "mylena"


async def test_a_setting_that_cannot_stand_is_not_taken(photographs, tiny_base):
    app = Wizard()
    async with app.run_test(size=SIZE) as pilot:
        await to_review(pilot, photographs, tiny_base)
        table = app.screen.query_one(DataTable)
        for name, text, words in (("rank", "many", "whole number"), ("optimizer", "Prodigyy", "Did you mean 'Prodigy'"),
                                  ("learning_rate", "1", "falls apart"), ("resolution", "100", "multiple of 64")):
            app.screen.query_one(DataTable).move_cursor(row=table.get_row_index(name))
            await press(pilot, "enter")
            await type_text(pilot, text)
            await press(pilot, "enter")
            assert isinstance(app.screen, SettingDialog)
            error = str(app.screen.query_one(".error", Static).content)
            assert error.startswith("! ") and words in error
            await press(pilot, "escape")
        assert app.answers.overrides == {}
        await press(pilot, "f3")
        assert "crumb plan --images" in screen_text(app)
        await press(pilot, "escape", "ctrl+n", "enter")
        assert isinstance(app.screen, ReviewScreen), "Enter in a question keeps everything as it is"


async def test_ascii_draws_no_other_letters(photographs):
    app = Wizard(ascii=True)
    async with app.run_test(size=SIZE) as pilot:
        for keys in ((), ("enter",), ("f1",)):
            await press(pilot, *keys)
            assert screen_text(app).isascii(), screen_text(app)
