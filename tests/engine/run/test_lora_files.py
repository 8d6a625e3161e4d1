"""Which LoRA files a run has, and which of them measured best."""

import pytest

from crumb.engine.run.directory import RunDirectory
from crumb.engine.run.events import EventWriter
from crumb.engine.run.lora_files import lora_files


@pytest.fixture
def run(tmp_path):
    run = RunDirectory(tmp_path / "ohwx")
    for step in (100, 200, 300):
        folder = run.checkpoints / f"step-{step:06d}"
        folder.mkdir(parents=True)
        (folder / f"ohwx-step-{step:06d}.safetensors").touch()
        (folder / "state.safetensors").touch()
    (run.checkpoints / ".step-000400.part").mkdir()
    (run.checkpoints / ".step-000400.part" / "ohwx-step-000400.safetensors").touch()
    return run


def judge(run, held_out: dict[int, float | None]):
    events = EventWriter(run.events)
    for step, loss in held_out.items():
        events.emit("judged", step=step, training_loss=1 / (1 + step), held_out_loss=loss, best=False, word="")
    events.close()


def test_files_by_step_with_their_losses(run):
    judge(run, {0: 0.1, 100: 0.5, 200: 0.9, 400: 0.6})
    judge(run, {200: 0.3})  # measured again after a resume
    run.result.touch()
    files = lora_files(run, 400)
    assert [file.step for file in files] == [100, 200, 300, 400]
    assert [file.describe() for file in files] == [
        ["step 100", "held-out loss 0.5000"], ["step 200", "held-out loss 0.3000", "best"],
        ["step 300", "not measured"], ["step 400 (final)", "held-out loss 0.6000"]]
    assert files[-1].path == run.result


def test_the_finished_file_stands_for_a_checkpoint_of_the_same_step(run):
    run.result.touch()
    assert [(file.step, file.is_final) for file in lora_files(run, 300)] == [(100, False), (200, False), (300, True)]


def test_nothing_held_out_means_no_best(run):
    judge(run, {100: None, 200: None, 300: None})
    assert [file.is_best for file in lora_files(run, 400)] == [False] * 3
    assert lora_files(run, 400)[2].describe() == ["step 300", "training loss 0.0033"]


def test_the_kept_best_is_there_when_its_checkpoint_is_not(run):
    judge(run, {100: 0.5, 150: 0.2})
    assert [file.step for file in lora_files(run, 400)] == [100, 200, 300]
    run.result.with_stem("ohwx-best").touch()
    files = lora_files(run, 400)
    assert [(file.step, file.is_best) for file in files] == [(100, False), (150, True), (200, False), (300, False)]
    assert lora_files(RunDirectory(run.path.parent / "none"), 1) == []


def test_a_step_whose_answers_were_no_numbers_is_told_and_never_the_best(run):
    judge(run, {100: 0.5})
    events = EventWriter(run.events)
    events.emit("judged", step=200, training_loss=None, held_out_loss=None, best=False, word="falling apart")
    events.close()
    assert [file.describe() for file in lora_files(run, 400)] == [
        ["step 100", "held-out loss 0.5000", "best"], ["step 200", "no number"], ["step 300", "not measured"]]
