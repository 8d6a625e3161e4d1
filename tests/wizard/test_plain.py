"""The line-by-line wizard, answered from a list as a person would type."""

import builtins
from argparse import Namespace

import pytest

from crumb.profiles.plan import load_plan
from crumb.wizard.cli import main
from crumb.wizard.draft import drop_draft, load_draft


@pytest.fixture
def typed(monkeypatch, tmp_path):
    """Feeds lines to input(); the end of the list is the end of the input."""
    monkeypatch.chdir(tmp_path)
    drop_draft()

    def feed(*lines):
        left = iter(lines)

        def answer(prompt=""):
            print(prompt)
            try:
                return next(left)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr(builtins, "input", answer)
        return main(["--plain"])

    yield feed
    drop_draft()


def test_from_first_question_to_the_plan_file(typed, tiny_base, photographs, tmp_path, capsys):
    code = typed("style", "2", "a, b", "ohwx", "", "/nowhere", str(photographs), "yes", str(tiny_base), "", "cpu", "",
                 "rnak=3", "steps=7", "w")
    output = capsys.readouterr().out
    assert code == 0, output
    assert "! A comma separates tags" in output and "! There is no folder /nowhere" in output
    assert "Did you mean 'rank'" in output
    plan = load_plan(tmp_path / "plan.toml")
    assert (plan.trigger, plan.steps, plan.device, plan.images) == ("ohwx", 7, "cpu", str(photographs))
    assert plan.flip
    assert load_draft() is None


def test_an_input_that_ends_keeps_the_answers(typed, photographs, capsys):
    assert typed("face", "", "ohwx", "", str(photographs)) == 2
    assert "answers so far are kept" in capsys.readouterr().err
    draft = load_draft()
    assert (draft.answers.subject, draft.answers.trigger, draft.answers.images) == ("face", "ohwx", str(photographs))


def test_enter_starts_the_run(typed, tiny_base, photographs, monkeypatch):
    from crumb.wizard import plain

    started = []
    monkeypatch.setattr(plain, "start_and_watch", lambda run, options: started.append((run, options)) or 0)
    assert typed("", "", "ohwx", "mine", str(photographs), "", str(tiny_base), "", "cpu", "", "") == 0
    (run, options), = started
    assert run.name == "mine" and load_plan(run.plan).device == "cpu" and not load_plan(run.plan).flip
    assert options == Namespace(detach=False, plain=True, ascii=False)
