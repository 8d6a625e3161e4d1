"""Sends a run's numbers to TensorBoard, Weights & Biases and the like through accelerate, where the plan names one."""

import logging
from collections.abc import Callable
from dataclasses import asdict

from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from crumb.engine.run.directory import RunDirectory
from crumb.profiles.errors import RequestError
from crumb.profiles.plan import Plan

log = logging.getLogger("crumb")

PROJECT = "crumb"
STEP_NUMBERS = ("loss", "loss_smoothed", "learning_rate", "grad_norm", "seconds", "images_per_s", "vram_peak_bytes")
JUDGED_NUMBERS = ("training_loss", "held_out_loss")


def start_trackers(plan: Plan, run: RunDirectory) -> list[GeneralTracker]:
    """The plan's trackers, started; RequestError where a service refuses."""
    trackers = []
    for name in plan.trackers:
        PartialState()  # accelerate's trackers ask it which process they are in
        make = LOGGER_TYPE_TO_CLASS[name]
        try:
            tracker = make(run.name, logging_dir=str(run.path / "trackers")) if make.requires_logging_directory else (
                make(PROJECT, **({"name": run.name} if name == "wandb" else {})))
            tracker.start()
            tracker.store_init_configuration(_plain(asdict(plan)))
        except Exception as error:  # each service has its own: no login, no network, no server
            raise RequestError(f"The tracker {name} can't be started ({type(error).__name__}: {error}). Mend that, or take it "
                               f"out of trackers in [output] of the plan.") from error
        trackers.append(tracker)
    return trackers


def track(trackers: list[GeneralTracker], fields: dict, warn: Callable[[str], None]) -> None:
    """The numbers of a `step` or `judged` event. A tracker that fails is told once and dropped: it is not the job."""
    names = JUDGED_NUMBERS if "training_loss" in fields else STEP_NUMBERS
    numbers = {name: fields[name] for name in names if fields.get(name) is not None}
    for tracker in list(trackers):
        try:
            tracker.log(numbers, step=fields["step"])
        except Exception as error:
            log.exception("tracker %s", tracker.name)
            warn(f"The tracker {tracker.name} failed at step {fields['step']} ({error}) and gets no more numbers. Training "
                 f"goes on.")
            trackers.remove(tracker)


def finish_trackers(trackers: list[GeneralTracker]) -> None:
    for tracker in trackers:
        try:
            tracker.finish()
        except Exception:
            log.exception("tracker %s did not finish", tracker.name)


def _plain(settings: dict) -> dict:
    """Values that every service takes: numbers, truths and texts."""
    return {name: value if isinstance(value, (bool, int, float, str)) else repr(value) for name, value in settings.items()}
