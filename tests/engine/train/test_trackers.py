"""Trackers get every number; a missing package or a failing service is a sentence, and never the end of a run."""

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from crumb.engine.run.directory import create_run
from crumb.engine.train.trackers import finish_trackers, start_trackers, track
from crumb.profiles.errors import RequestError
from crumb.profiles.plan_rules import TRACKERS

STEPS = [{"step": step, "epoch": 0.1, "loss": 0.5 / step, "loss_smoothed": 0.5, "learning_rate": 1e-4, "grad_norm": None,
          "seconds": 1.0, "images_per_s": 2.0} for step in (1, 2, 3)]


def test_the_names_are_accelerates():
    assert set(TRACKERS) == set(LOGGER_TYPE_TO_CLASS)


def test_tensorboard_reads_back_what_was_sent(make_plan):
    run = create_run("tracked", "plan")
    trackers = start_trackers(make_plan(trackers=["tensorboard"]), run)
    for fields in [*STEPS, {"step": 3, "training_loss": 0.2, "held_out_loss": 0.3}]:
        track(trackers, fields, AssertionError)
    finish_trackers(trackers)
    events = EventAccumulator(str(run.path / "trackers" / "tracked")).Reload()
    assert [(event.step, round(event.value, 5)) for event in events.Scalars("loss")] == [(1, 0.5), (2, 0.25), (3, 0.16667)]
    assert events.Scalars("held_out_loss")[0].value == pytest.approx(0.3)
    assert "grad_norm" not in events.Tags()["scalars"]


def test_no_tracker_is_started_unasked(make_plan):
    run = create_run("untracked", "plan")
    assert start_trackers(make_plan(), run) == [] and not (run.path / "trackers").exists()


def test_unknown_names_are_refused(make_plan):
    with pytest.raises(RequestError, match="tensorboard"):
        make_plan(trackers=["tensorbord"])


def test_a_tracker_that_fails_is_dropped_and_told(make_plan):
    trackers = start_trackers(make_plan(trackers=["tensorboard"]), create_run("b", "plan"))
    told = []
    trackers[0].log = lambda *_, **__: 1 / 0
    track(trackers, STEPS[0], told.append)
    assert trackers == [] and "division by zero" in told[0]
    track(trackers, STEPS[1], told.append)
    assert len(told) == 1
