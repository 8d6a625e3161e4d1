"""What `crumb sheet` refuses before anything is drawn, in words and with the right exit code."""

import pytest

from crumb.engine.run.directory import create_run, engine_lock
from crumb.profiles.hardware import Gpu
from crumb.profiles.plan import dump_plan
from crumb.wizard import sheet
from crumb.wizard.cli import build_parser, main


@pytest.fixture
def run(make_plan, monkeypatch):
    def make(name: str = "ohwx", **settings):
        run = create_run(name, dump_plan(make_plan(name=name, **{"sample_prompts": ["a", "b --d 3"]} | settings)))
        run.result.touch()
        return run
    monkeypatch.setattr(sheet, "draw", lambda *_: pytest.fail("it should have been refused"))
    return make


def refused(capsys, code: int, *arguments) -> str:
    assert main(["sheet", *map(str, arguments)]) == code
    return capsys.readouterr().err


def test_unknown_runs_and_runs_without_a_file(run, capsys):
    assert "no run called 'nowhere'" in refused(capsys, 2, "nowhere")
    empty = run("empty")
    empty.result.unlink()
    assert "no LoRA file yet" in refused(capsys, 2, "empty")


@pytest.mark.parametrize(("arguments", "words"), [
    (["--prompts", "3"], "2 sample prompts"),
    (["--prompts", "0"], "2 sample prompts"),
    (["--prompts", "a cat --w 100"], "Use --w 128"),
    (["--steps", "0"], "between 1 and 200"),
    (["--steps", "many"], "whole number"),
    (["--out", "sheet.jpg"], "sheet.png"),
    (["--out", "nowhere/sheet.png"], "is not there"),
])
def test_wrong_requests(run, capsys, arguments, words):
    run()
    assert words in refused(capsys, 2, "ohwx", *arguments)


def test_a_plan_without_prompts_needs_some(run, capsys):
    run(sample_prompts=[])
    assert "--prompts" in refused(capsys, 2, "ohwx")


@pytest.mark.parametrize("text", ["", "a,b", "0", "0.5,", "9", "nan"])
def test_wrong_strengths(text, capsys):
    with pytest.raises(SystemExit) as left:
        build_parser().parse_args(["sheet", "ohwx", f"--strengths={text}"])
    assert left.value.code == 2 and "such as 0.6,0.8,1.0" in capsys.readouterr().err


def test_strengths_are_taken_once_and_in_order():
    options = build_parser().parse_args(["sheet", "ohwx", "--strengths=1,0,0.5,1.0,-0.5"])
    assert options.strengths == [1.0, 0.5, -0.5]


@pytest.mark.parametrize("training", ["ohwx", "another"])
def test_a_gpu_in_use_is_busy(run, capsys, monkeypatch, training):
    runs = {name: run(name, device="auto") for name in ("ohwx", "another")}
    monkeypatch.setattr(sheet, "detect_gpu", lambda: Gpu("card", 8.0, 8.6))
    with engine_lock(runs[training]):
        assert f"crumb stop {training}" in refused(capsys, 75, "ohwx")


@pytest.mark.parametrize(("device", "gpu"), [("cpu", Gpu("card", 8.0, 8.6)), ("auto", None)])
def test_training_on_the_processor_is_no_hindrance(run, monkeypatch, capsys, device, gpu):
    asked = {}
    monkeypatch.setattr(sheet, "draw", lambda run, request, num_pictures, options: asked.update(request) or 1)
    monkeypatch.setattr(sheet, "detect_gpu", lambda: gpu)
    with engine_lock(run(device=device)):
        assert main(["sheet", "ohwx", "--prompts", "1", "--steps", "7"]) == 1
    assert asked["lines"] == ["a"] and asked["steps"] == 7 and asked["strengths"] == [0.4, 0.6, 0.8, 1.0, 1.2]
    assert asked["out"].endswith("/ohwx/sheet.png")
