"""What the events of a run add up to: folded step by step, so that a watcher never reads the history twice.

Separate from the view because every front end (full screen, plain lines, the wizard) shows these numbers.
Its size stays bounded however long the run is.
"""

import math
import statistics
from collections import deque
from dataclasses import dataclass, field
from typing import Any, NamedTuple

MAX_POINTS = 4000
"""Loss points kept; when there are more, every second one goes."""

WHILE_TRAINING = ("", "train", "judge", "sample", "save")
"""Phases in which the bar counts steps."""

PHASE_WORDS = {
    "scan": "reading the pictures",
    "hash": "checking the base model",
    "cache latents": "encoding pictures",
    "cache captions": "encoding captions",
    "load": "loading the base model",
    "fit": "trying whether the largest pictures fit",
    "train": "training",
    "judge": "measuring on fixed noise",
    "sample": "drawing sample pictures",
    "save": "saving",
}


class LossPoint(NamedTuple):
    """One step of the curve; None where the loss was NaN or Inf and the step was dropped."""

    step: int
    raw: float | None
    smoothed: float | None


class JudgedPoint(NamedTuple):
    """Losses on fixed noise after a step; held_out is None where no picture is held out."""

    step: int
    training: float
    held_out: float | None


class Remark(NamedTuple):
    """One event in words. kind: plain | good | warning | error."""

    time: float
    kind: str
    words: str


@dataclass
class DashboardState:
    """Numbers are None until an event has told them."""

    device: str = ""
    step: int = 0
    steps: int = 0
    epoch: int | None = None
    phase: str = ""
    phase_since: float | None = None
    progress: tuple[int, int] | None = None
    numbers: dict[str, Any] = field(default_factory=dict)

    points: list[LossPoint] = field(default_factory=list)
    stride: int = 1
    num_steps_seen: int = 0
    num_skipped: int = 0
    last_loss: float | None = None
    smoothed_loss: float | None = None
    best_loss: float | None = None

    judged: list[JudgedPoint] = field(default_factory=list)
    verdict: str = ""
    remedy: str = ""
    verdict_basis: str = ""

    learning_rate: float | None = None
    grad_norm: float | None = None
    images_per_s: float | None = None
    recent_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=51))
    recent_waits: deque[float] = field(default_factory=lambda: deque(maxlen=51))
    vram_allocated_bytes: int | None = None
    vram_peak_bytes: int | None = None

    remarks: deque[Remark] = field(default_factory=lambda: deque(maxlen=200))
    num_remarks: int = 0
    warnings: deque[str] = field(default_factory=lambda: deque(maxlen=50))
    num_warnings: int = 0
    samples: deque[tuple[int, list[str]]] = field(default_factory=lambda: deque(maxlen=200))
    saved: deque[tuple[int, str]] = field(default_factory=lambda: deque(maxlen=200))
    result: str = ""
    error: str = ""
    outcome: str = ""

    earlier_seconds: float = 0.0
    life_since: float | None = None
    last_time: float | None = None
    last_step_time: float | None = None

    @property
    def seconds_per_step(self) -> float | None:
        """The median of recent steps: one that waited for a sample or the disk does not move it."""
        return statistics.median(self.recent_seconds) if self.recent_seconds else None

    @property
    def data_wait_share(self) -> float | None:
        spent = sum(self.recent_seconds)
        return min(1.0, sum(self.recent_waits) / spent) if spent and self.recent_waits else None

    def elapsed_s(self, now: float) -> float:
        """Time the engine has worked, all its lives together."""
        if self.life_since is None:
            return self.earlier_seconds
        until = self.last_time if self.outcome else now
        return self.earlier_seconds + max(0.0, until - self.life_since)

    def remaining_s(self, now: float) -> float | None:
        """Time to the last step at the recent speed, or to the end of a phase that counts its progress."""
        if self.outcome:
            return None
        if self.phase not in WHILE_TRAINING and self.progress and self.phase_since is not None:
            done, total = self.progress
            return (now - self.phase_since) / done * max(0, total - done) if done else None
        if len(self.recent_seconds) < 3 or not self.steps:
            return None
        return max(0, self.steps - self.step) * self.seconds_per_step


def fold(state: DashboardState, events: list[dict]) -> None:
    """Brings `state` up to date, in place; event types it does not know are passed over."""
    for event in events:
        handle = _HANDLERS.get(event["type"])
        when = finite(event.get("time"))
        if handle:
            handle(state, event, when if when is not None else state.last_time or 0.0)
        if when is not None:
            state.last_time = when


def clean(text: Any) -> str:
    """One line of printable text: file names and messages must not move the cursor."""
    return "".join(char if char.isprintable() else " " for char in str(text))


def _started(state: DashboardState, event: dict, when: float) -> None:
    step = int(event.get("step") or 0)
    if state.life_since is not None and state.last_time is not None:
        state.earlier_seconds += max(0.0, state.last_time - state.life_since)
    state.life_since = when
    state.device = clean(event.get("device") or state.device)
    state.steps = int(event.get("steps") or state.steps)
    state.outcome = state.error = state.result = ""
    state.phase, state.progress, state.last_step_time = "", None, None
    state.recent_seconds.clear()
    state.recent_waits.clear()
    if step < state.step:
        _rewind(state, step)
    state.step = step
    _remark(state, when, "plain", f"resumed from step {step}" if step else f"started on {state.device or 'n/a'}")


def _rewind(state: DashboardState, step: int) -> None:
    """Forgets the steps that a resumed run makes again."""
    state.points = [point for point in state.points if point.step <= step]
    smoothed = [point.smoothed for point in state.points if point.smoothed is not None]
    raw = [point.raw for point in state.points if point.raw is not None]
    state.best_loss = min(smoothed, default=None)
    state.smoothed_loss = smoothed[-1] if smoothed else None
    state.last_loss = raw[-1] if raw else None
    state.num_skipped = sum(point.raw is None for point in state.points)
    state.judged = [judged for judged in state.judged if judged.step <= step]


def _phase(state: DashboardState, event: dict, when: float) -> None:
    phase = str(event.get("phase", ""))
    if phase == state.phase:
        return
    state.phase, state.phase_since, state.progress = phase, when, None
    if phase == "train":
        # Sample pictures are drawn between two steps: the wait for the next one starts when they are done.
        state.last_step_time = when
    if phase not in WHILE_TRAINING:
        _remark(state, when, "plain", PHASE_WORDS.get(phase, clean(phase)))


def _progress(state: DashboardState, event: dict, when: float) -> None:
    if event.get("phase", state.phase) != state.phase:
        _phase(state, event, when)
    state.progress = (int(event.get("done") or 0), int(event.get("total") or 0))


def _numbers(state: DashboardState, event: dict, when: float) -> None:
    state.numbers = {key: value for key, value in event.items() if key not in ("time", "type")}
    state.steps = int(event.get("steps") or state.steps)
    counts = (("num_pictures", "picture"), ("num_held_out", "of them held out"), ("num_regularization", "for regularization"),
              ("num_buckets", "bucket"), ("steps_per_epoch", "steps per epoch"))
    words = [f"{event[key]:g} {noun}{'s' * (' ' not in noun and event[key] != 1)}" for key, noun in counts
             if finite(event.get(key))]
    if words:
        _remark(state, when, "plain", ", ".join(words))


def _placement(state: DashboardState, event: dict, when: float) -> None:
    state.numbers["placement"] = event.get("placement") or state.numbers.get("placement")
    costs = "; ".join(clean(cost) for cost in event.get("costs") or [])
    if costs:
        _remark(state, when, "plain", f"to fit into memory: {costs}")
    predicted, measured = finite(event.get("predicted_bytes")), finite(event.get("measured_bytes"))
    if predicted and measured:
        _remark(state, when, "plain", f"the largest pictures take {measured / 2**30:.2f} GiB, by arithmetic "
                                      f"{predicted / 2**30:.2f}")


def _texts(state: DashboardState, event: dict, when: float) -> None:
    num_texts, num_bytes = int(event.get("num_texts") or 0), finite(event.get("num_bytes")) or 0
    _remark(state, when, "plain", f"captions are shown as {num_texts} texts, {num_bytes / 1e6:.1f} MB encoded on disk")


def _step(state: DashboardState, event: dict, when: float) -> None:
    step = int(event.get("step") or state.step)
    if state.phase != "train":
        _phase(state, {"phase": "train"}, when)
    state.step, state.outcome, state.last_step_time = step, "", when
    state.epoch = event.get("epoch", state.epoch)
    raw, smoothed = finite(event.get("loss")), finite(event.get("loss_smoothed"))
    skipped = bool(event.get("skipped")) or raw is None
    if skipped:
        raw = None
        state.num_skipped += 1
        _remark(state, when, "warning", f"step {step} dropped: its loss was not a number")
    else:
        state.last_loss = raw
    if smoothed is not None:
        state.smoothed_loss = smoothed
        if state.best_loss is None or smoothed < state.best_loss:
            state.best_loss = smoothed
    _keep_point(state, LossPoint(step, raw, smoothed), always=skipped)
    for name in ("learning_rate", "grad_norm", "images_per_s", "vram_allocated_bytes"):
        value = finite(event.get(name))
        if value is not None:
            setattr(state, name, value)
    peak = finite(event.get("vram_peak_bytes"))
    if peak is not None:
        state.vram_peak_bytes = max(peak, state.vram_peak_bytes or 0)
    seconds = finite(event.get("seconds"))
    if seconds is not None and seconds > 0:
        state.recent_seconds.append(seconds)
        state.recent_waits.append(finite(event.get("data_wait_s")) or 0.0)


def _keep_point(state: DashboardState, point: LossPoint, always: bool) -> None:
    state.num_steps_seen += 1
    if always or state.num_steps_seen % state.stride == 0:
        state.points.append(point)
    if len(state.points) > MAX_POINTS:
        state.points = state.points[1::2]
        state.stride *= 2


def _judged(state: DashboardState, event: dict, when: float) -> None:
    step = int(event.get("step") or 0)
    training, held_out = finite(event.get("training_loss")), finite(event.get("held_out_loss"))
    state.verdict, state.remedy = clean(event.get("word") or ""), clean(event.get("remedy") or "")
    state.verdict_basis = clean(event.get("basis") or "")
    if training is None:
        _remark(state, when, "warning", f"at step {step} the U-Net's answers are no numbers: {state.verdict}. {state.remedy}")
        return
    state.judged.append(JudgedPoint(step, training, held_out))
    held = "" if held_out is None else f", held-out {held_out:.4f}{' (best)' if event.get('best') else ''}"
    words = f"on fixed noise at step {step}: training {training:.4f}{held}"
    _remark(state, when, "plain", f"{words}: {state.verdict}" if state.verdict else words)


def _sample(state: DashboardState, event: dict, when: float) -> None:
    step, paths = int(event.get("step") or 0), [clean(path) for path in event.get("paths") or []]
    state.samples.append((step, paths))
    if paths:
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        _remark(state, when, "good", f"sample pictures at step {step}: {paths[0]}{more}")


def _saved(state: DashboardState, event: dict, when: float) -> None:
    step, path = int(event.get("step") or 0), clean(event.get("path", ""))
    state.saved.append((step, path))
    if event.get("kind") == "result":
        state.result = path
        _remark(state, when, "good", f"LoRA file saved: {path}")
    elif event.get("kind") == "best":
        _remark(state, when, "good", f"best held-out loss was at step {step}, saved beside it: {path}")
    else:
        _remark(state, when, "good", f"checkpoint saved: {path}")


def _warning(state: DashboardState, event: dict, when: float) -> None:
    text = clean(event.get("text", ""))
    state.warnings.append(text)
    state.num_warnings += 1
    _remark(state, when, "warning", f"warning: {text}")


def _error(state: DashboardState, event: dict, when: float) -> None:
    state.error, state.outcome = clean(event.get("text", "")), "failed"
    _remark(state, when, "error", f"error: {state.error}")


def _stopped(state: DashboardState, event: dict, when: float) -> None:
    state.step, state.outcome = int(event.get("step") or state.step), "stopped"
    _remark(state, when, "plain", f"stopped at step {state.step}, everything is saved")


def _finished(state: DashboardState, event: dict, when: float) -> None:
    state.step, state.outcome = int(event.get("step") or state.step), "finished"
    state.result = clean(event.get("path") or state.result)
    peak = finite(event.get("vram_peak_bytes"))
    state.vram_peak_bytes = peak if peak is not None else state.vram_peak_bytes
    if state.verdict_basis:
        _remark(state, when, "plain", f"verdict: {state.verdict or 'none'} ({state.verdict_basis}). {state.remedy}".strip())
    _remark(state, when, "good", f"finished: {state.result}")


def _remark(state: DashboardState, when: float, kind: str, words: str) -> None:
    state.remarks.append(Remark(when, kind, words))
    state.num_remarks += 1


def finite(value: Any) -> float | None:
    """A finite number as it is; anything else is None."""
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


_HANDLERS = {
    "started": _started, "phase": _phase, "progress": _progress, "numbers": _numbers, "placement": _placement,
    "texts": _texts, "step": _step, "judged": _judged, "sample": _sample, "saved": _saved, "warning": _warning,
    "error": _error, "stopped": _stopped, "finished": _finished,
}
