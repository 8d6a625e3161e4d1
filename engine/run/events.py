"""events.jsonl: one JSON object a line, only ever appended, read by any number of watchers.

Every event has `time` (unix seconds) and `type`. The types and their fields:

    started   pid, device, versions {name: version}, step (the last finished one), steps
    phase     phase: scan | hash | cache latents | cache captions | load | fit | train | judge | sample | save
    progress  phase, done, total
    picture   path, size [w, h], bucket [w, h], resized [w, h], crop [left, top], cropped_share, repeats,
              regularization, flip (may be shown mirrored), mask (its path or null), loss_weight
    numbers   num_pictures (num_held_out of them only measured), num_regularization (beside them), num_buckets,
              steps_per_epoch, steps, num_parameters, placement, num_processes, pictures_per_step (of all processes together)
    placement placement (in words), costs (what is paid for fitting into memory, lines), predicted_bytes and measured_bytes
              of the largest pictures' pass, as torch takes them of the GPU (null on a processor); again after every rung down
    texts     num_texts (that captions are shown as, all kept encoded), num_bytes (on disk)
    step      step, epoch, loss, loss_smoothed, learning_rate, grad_norm, seconds, images_per_s,
              data_wait_s, vram_allocated_bytes, vram_reserved_bytes, vram_peak_bytes (on a GPU);
              skipped (true when NaN/Inf dropped it). The rate is the one in force: Prodigy's d is in it.
    judged    step, training_loss, held_out_loss (null where none is held out), best (the lowest held-out loss so far),
              word (learning | fitted | overfitting | not learning | falling apart, or ""
              too early), remedy, basis
    sample    step, paths
    saved     step, path, kind: checkpoint | result | best
    warning   text
    error     text
    stopped   step
    finished  step, path, seconds, vram_peak_bytes

Paths inside the run directory are written relative to it, so that a copied run still reads.
"""

import json
import os
import time
from pathlib import Path


class EventWriter:
    """Appends events to one file; each line leaves the process whole, in one write."""

    def __init__(self, path: Path):
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        # A process killed in the middle of a line leaves half of one: start on a fresh line.
        if path.stat().st_size and not _ends_with_newline(path):
            os.write(self._descriptor, b"\n")

    def emit(self, type: str, **fields) -> None:
        line = json.dumps({"time": round(time.time(), 3), "type": type, **fields}, ensure_ascii=False)
        # A file name that is no UTF-8 arrives as lone surrogates; escaped they are valid JSON.
        os.write(self._descriptor, line.encode("utf-8", "backslashreplace") + b"\n")

    def close(self) -> None:
        os.close(self._descriptor)


class SilentEvents:
    """What a process that is not the first of its run has for an EventWriter."""

    def emit(self, type: str, **fields) -> None:
        """Nothing is told: the first process says the same."""

    def close(self) -> None:
        """Nothing is open."""


def read_events(path: Path, offset: int = 0) -> tuple[list[dict], int]:
    """Whole events from byte `offset` on, and the offset to go on from.

    A half-written last line stays for the next call; a line that is no JSON object is passed over.
    """
    if not path.exists():
        return [], offset
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read()
    end = data.rfind(b"\n") + 1
    events = []
    for line in data[:end].splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and isinstance(event.get("type"), str):
            events.append(event)
    return events, offset + end


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
