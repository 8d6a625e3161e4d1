"""The run as plain lines, for pipes, logs and terminals that can't move the cursor.

Says at once what matters (phases, saves, warnings, the end) and thins out what only ticks.
"""

import sys
import time

from crumb.wizard.dashboard.figures import clock, figure, gib, rate
from crumb.wizard.dashboard.state import PHASE_WORDS, DashboardState, clean, fold

PROGRESS_EVERY_S = 5.0
STEP_EVERY_S = 2.0


class PlainLines:
    """Folds events into `state` one by one and prints what is worth a line."""

    def __init__(self, state: DashboardState):
        self.state = state
        self._progress_at = self._step_at = -1e9
        self._tenth = -1

    def follow(self, events: list[dict], now: float | None = None) -> None:
        """now: monotonic seconds."""
        now = time.monotonic() if now is None else now
        for event in events:
            remarks_before = self.state.num_remarks
            phase_before = self.state.phase
            fold(self.state, [event])
            when = self.state.last_time
            new = self.state.num_remarks - remarks_before
            for remark in list(self.state.remarks)[-new:] if new else []:
                say(remark.words, remark.time)
            phase = self.state.phase
            if phase != phase_before and (phase == "sample" or (phase == "train" and not self.state.step)):
                say(PHASE_WORDS[phase], when)
            if event["type"] == "progress":
                self._progress(when, now)
            elif event["type"] == "step":
                self._step(when, now)

    def _progress(self, when: float | None, now: float) -> None:
        if now - self._progress_at >= PROGRESS_EVERY_S:
            self._progress_at = now
            done, total = self.state.progress
            say(f"{PHASE_WORDS.get(self.state.phase, self.state.phase)} {done}/{total}", when)

    def _step(self, when: float | None, now: float) -> None:
        state = self.state
        tenth = state.step * 10 // state.steps if state.steps else 0
        if now - self._step_at < STEP_EVERY_S and tenth == self._tenth:
            return
        self._step_at, self._tenth = now, tenth
        seconds, left = state.seconds_per_step, state.remaining_s(when or 0.0)
        parts = [
            f"step {state.step}/{state.steps}",
            f"epoch {state.epoch}" if state.epoch is not None else "",
            f"loss {figure(state.last_loss)} smoothed {figure(state.smoothed_loss)}",
            f"lr {rate(state.learning_rate)}",
            f"{seconds:.2f} s/step" if seconds is not None else "",
            f"VRAM peak {gib(state.vram_peak_bytes)}" if state.vram_peak_bytes else "",
            f"left {clock(left)}" if left is not None else "",
        ]
        say("  ".join(part for part in parts if part), when)


def say(words: str, when: float | None = None) -> None:
    """One line at once, whatever the encoding of stdout."""
    line = f"{time.strftime('%H:%M:%S', time.localtime(when))}  {clean(words)}"
    encoding = sys.stdout.encoding or "utf-8"
    print(line.encode(encoding, "backslashreplace").decode(encoding), flush=True)
