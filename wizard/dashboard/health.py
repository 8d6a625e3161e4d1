"""How a run is and what it does, in words.

Separate from the folding of events because the verdict needs two more witnesses: state.json and the clock.
"""

from crumb.engine.run.directory import HEARTBEAT_S
from crumb.wizard.dashboard.state import PHASE_WORDS, DashboardState, clean, finite

STALL_S = 2.5 * HEARTBEAT_S
"""Silence that is worth a word: two heartbeats missed, seen before 15 s are over."""

ENDED = ("finished", "done", "failed", "refused", "stopped", "lost", "new")
"""Values of `state` in state.json in which no engine is at work."""

STATE_WORDS = {"new": "not started", "preparing": "starting", "done": "finished", "lost": "process gone"}


def health(state: DashboardState, run_state: dict, now: float, name: str = "NAME") -> str:
    """How the run is, in words. run_state: state.json as read_state gives it; now: unix seconds."""
    status = run_state.get("state", "")
    step = state.step or run_state.get("step") or 0
    if status == "lost":
        return "process gone"
    if status == "preparing" and (state.outcome or not state.phase):
        return "running"
    if state.outcome == "finished" or status in ("finished", "done"):
        return "finished"
    if state.outcome == "failed" or status in ("failed", "refused"):
        return f"failed: {clean(state.error or run_state.get('error') or 'see engine.log')}"
    if state.outcome == "stopped" or status == "stopped":
        return f"stopped at step {step} (resume with: crumb resume {name})"
    if status == "new":
        return f"not started (start with: crumb resume {name})"
    beat = finite(run_state.get("heartbeat"))
    silent_s = now - beat if beat is not None else 0.0
    if state.phase == "train" and state.last_step_time is not None:
        stepless_s = now - state.last_step_time
        if silent_s > STALL_S or stepless_s > max(STALL_S, 4 * (state.seconds_per_step or 0)):
            return f"no step for {max(silent_s, stepless_s):.0f} s"
    elif silent_s > STALL_S:
        return f"no heartbeat for {silent_s:.0f} s"
    return "running"


def phase_words(state: DashboardState, run_state: dict) -> str:
    """What the engine is doing now, or how it ended."""
    status = run_state.get("state") or "new"
    if status in ("lost", "preparing") and (state.outcome or status == "lost" or not state.phase):
        return STATE_WORDS[status]
    if state.outcome:
        return state.outcome
    if state.phase and status not in ENDED:
        return PHASE_WORDS.get(state.phase, clean(state.phase))
    return STATE_WORDS.get(status, clean(status))
