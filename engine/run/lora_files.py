"""The LoRA files that a run has to choose from, each with the loss that was measured at its step. Torch-free."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from crumb.engine.run.directory import RunDirectory
from crumb.engine.run.events import read_events
from crumb.profiles.verdict import Judged, best_of

IN_CHECKPOINT = re.compile(r".+-step-(\d+)\.safetensors")


@dataclass(frozen=True)
class LoraFile:
    """One file; `judged` is None where nothing was measured at its step, `is_best` the lowest held-out loss of all."""

    path: Path
    step: int
    judged: Judged | None = None
    is_final: bool = False
    is_best: bool = False

    def describe(self) -> list[str]:
        """Short lines: which step, its loss, the best or not."""
        loss = "not measured"
        if self.judged:
            kind = "training" if self.judged.held_out_loss is None else "held-out"
            value = self.judged.telling_loss
            loss = f"{kind} loss {value:.4f}" if value is not None else "no number"
        return [f"step {self.step}" + " (final)" * self.is_final, loss, *["best"] * self.is_best]


def lora_files(run: RunDirectory, last_step: int) -> list[LoraFile]:
    """Every LoRA in the run's checkpoints, then the finished one, by step. `last_step` is the plan's `steps`.

    With nothing held out none is the best: the loss on training pictures falls on while a LoRA gets worse.
    """
    judged = judgings(run)
    steps = {int(match[1]): path for path in run.checkpoints.glob("step-*/*.safetensors")
             if (match := IN_CHECKPOINT.fullmatch(path.name))}
    kept = run.result.with_stem(f"{run.name}-best")
    best = best_of(list(judged.values()))
    if best and kept.exists():  # the same file as in its checkpoint, which may have been deleted since
        steps.setdefault(best.step, kept)
    if run.result.exists():
        steps[last_step] = run.result
    files = [LoraFile(path, step, judged.get(step), path == run.result) for step, path in sorted(steps.items())]
    best = best_of([file.judged for file in files if file.judged])
    return [replace(file, is_best=best is not None and file.judged is best) for file in files]


def judgings(run: RunDirectory) -> dict[int, Judged]:
    """By step; a step that was measured again after a resume counts as measured last."""
    events, _ = read_events(run.events)
    return {event["step"]: Judged(event["step"], event["training_loss"], event["held_out_loss"])
            for event in events if event["type"] == "judged"}
