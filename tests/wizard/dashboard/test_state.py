import time
from sys import getsizeof

import pytest

from crumb.wizard.dashboard.health import health, phase_words
from crumb.wizard.dashboard.state import MAX_POINTS, DashboardState, fold


def step(number: int, when: float, loss: float = 0.1, **more) -> dict:
    return {"time": when, "type": "step", "step": number, "epoch": 1, "loss": loss, "loss_smoothed": loss + 0.01,
            "learning_rate": 1e-4, "grad_norm": 0.5, "seconds": 2.0, "images_per_s": 0.5, "data_wait_s": 0.1,
            "vram_allocated_bytes": 2**30, "vram_peak_bytes": 3 * 2**30, **more}


def test_a_history_with_a_resume_and_a_dropped_step_adds_up():
    nan = float("nan")
    state = DashboardState()
    fold(state, [
        {"time": 100.0, "type": "started", "device": "cuda", "step": 0, "steps": 10},
        {"time": 100.0, "type": "phase", "phase": "cache latents"},
        {"time": 101.0, "type": "progress", "phase": "cache latents", "done": 3, "total": 4},
        {"time": 103.0, "type": "phase", "phase": "train"},
        step(1, 105.0, 0.30), step(2, 107.0, nan, skipped=True, loss_smoothed=None), step(3, 109.0, 0.20),
        {"time": 109.5, "type": "saved", "step": 3, "path": "checkpoints/step-000003", "kind": "checkpoint"},
        step(4, 111.0, 0.05, vram_peak_bytes=4 * 2**30),
        {"time": 111.5, "type": "warning", "text": "a\x1b[31m picture\nis small"},
        {"time": 112.0, "type": "from the future", "what": 1},
    ])
    assert (state.step, state.best_loss, state.num_skipped) == (4, pytest.approx(0.06), 1)
    assert state.remaining_s(112.0) == 12.0

    fold(state, [{"time": 500.0, "type": "started", "device": "cuda", "step": 3, "steps": 10}, step(4, 502.0, 0.25)])
    assert [(p.step, p.raw) for p in state.points] == [(1, 0.30), (2, None), (3, 0.20), (4, 0.25)]
    assert state.best_loss == pytest.approx(0.21), "the best of a dropped step must not stay"
    assert state.last_loss == 0.25 and state.learning_rate == 1e-4 and state.vram_peak_bytes == 4 * 2**30
    assert state.elapsed_s(510.0) == pytest.approx(12.0 + 10.0), "the pause between two lives is not counted"
    assert list(state.warnings) == ["a [31m picture is small"]
    assert state.data_wait_share == pytest.approx(0.05)


@pytest.mark.parametrize(("event", "status", "now", "words"), [
    (None, {"state": "training", "heartbeat": 104.0}, 105.0, "running"),
    (None, {"state": "training", "heartbeat": 104.0}, 118.0, "no step for 14 s"),
    (None, {"state": "training", "heartbeat": 150.0}, 150.0, "no step for 46 s"),
    (None, {"state": "lost"}, 105.0, "process gone"),
    ({"type": "stopped", "step": 7}, {"state": "stopped"}, 105.0, "stopped at step 7 (resume with: crumb resume cat)"),
    ({"type": "error", "text": "disk full"}, {"state": "failed"}, 105.0, "failed: disk full"),
    ({"type": "finished", "step": 10, "path": "cat.safetensors"}, {"state": "finished"}, 105.0, "finished"),
    ({"type": "stopped", "step": 7}, {"state": "preparing", "heartbeat": 104.0}, 105.0, "running"),
])
def test_health_in_words(event, status, now, words):
    state = DashboardState()
    fold(state, [{"time": 100.0, "type": "started", "step": 0, "steps": 10}, step(7, 104.0)])
    fold(state, [{"time": 104.5, **event}] if event else [])
    assert health(state, status, now, "cat") == words


def test_slow_steps_are_no_stall_and_phases_have_words():
    state = DashboardState()
    fold(state, [step(1, 100.0, seconds=30.0)])
    assert health(state, {"state": "training", "heartbeat": 139.0}, 140.0) == "running"
    fold(state, [{"time": 141.0, "type": "phase", "phase": "cache latents"}])
    assert phase_words(state, {"state": "preparing"}) == "encoding pictures"
    assert health(state, {"state": "preparing", "heartbeat": 141.0}, 155.0) == "no heartbeat for 14 s"


def test_a_long_history_is_folded_fast_and_stays_small():
    events = [step(number, float(number)) for number in range(1, 200_001)]
    state = DashboardState()
    began = time.process_time()
    for start in range(0, len(events), 1000):
        fold(state, events[start:start + 1000])
    took = time.process_time() - began
    assert took < 3.0, f"200k events took {took:.1f} s"
    assert MAX_POINTS / 2 < len(state.points) <= MAX_POINTS
    assert state.step == 200_000 and state.points[-1].step > 199_000
    gaps = {b.step - a.step for a, b in zip(state.points, state.points[1:])}
    assert len(gaps) == 1, f"thinning must keep the curve evenly spaced, gaps {gaps}"
    assert getsizeof(state.points) < 100_000 and len(state.remarks) <= 200
