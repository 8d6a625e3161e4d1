"""Seconds per step, against sums made by hand."""

import pytest

from crumb.profiles.gpu_table import Gpu
from crumb.profiles.hardware import resolve_gpu
from crumb.profiles.speed import Pass, Work, seconds_per_step

FORWARD = Pass(linear_flops=4.4e12, conv_flops=1.6e12, attention_flops=0.7e12, lora_flops=0.1e12)  # 6.8 TFLOP in all
BACKWARD = Pass(linear_flops=7.8e12)
STREAMED = Pass(streamed_bytes=2.4e9)
CARD = Gpu("card", 8, 8.6, fp16_tflops=20, bf16_tflops=20, fp32_tflops=10, int8_tops=80, bandwidth_gb_per_s=250,
           pcie_generation=4, pcie_lanes=8)
EXACT = {"overhead_s": 0, "efficiency": 0.5}


def test_work_over_rate():
    """6.8 + 7.8 TFLOP at half of 20 TFLOP/s; recomputing adds 6.8."""
    speed = seconds_per_step(Work(FORWARD, BACKWARD), CARD, "bf16", **EXACT)
    assert speed.seconds == pytest.approx(1.46) and speed.forward.compute_s == pytest.approx(0.68)
    again = seconds_per_step(Work(FORWARD, BACKWARD, FORWARD), CARD, "bf16", **EXACT)
    assert again.seconds == pytest.approx(2.14) and "21.4 TFLOP (6.8 of them a second time)" in again.explain()
    half = seconds_per_step(Work(FORWARD, BACKWARD, FORWARD * 0.5), CARD, "bf16", **EXACT)
    assert half.seconds == pytest.approx(1.80)
    assert seconds_per_step(Work(FORWARD, BACKWARD), CARD, "no", **EXACT).seconds == pytest.approx(2.92)


def test_transfers_hide_behind_work_pass_by_pass():
    """2.4 GB at 12 GB/s are 0.2 s a pass: less than 0.68 and 0.78 s of work, but more than a tenth of it."""
    large, small = (seconds_per_step(Work(FORWARD * size + STREAMED, BACKWARD * size + STREAMED), CARD, "bf16", **EXACT)
                    for size in (1, 0.1))
    assert large.seconds == pytest.approx(1.46)
    assert "2 x 2.4 GB over PCIe at 12 GB/s = 0.40 s, hidden behind it" in large.explain()
    assert small.seconds == pytest.approx(0.40, abs=0.005) and "s of it waited for" in small.explain()
    again = seconds_per_step(Work(FORWARD + STREAMED, BACKWARD + STREAMED, FORWARD + STREAMED), CARD, "bf16", **EXACT)
    assert again.backward.transfer_s == pytest.approx(0.2, abs=0.005), "a block that is computed again is there already"
    one_sided = seconds_per_step(Work(FORWARD * 0.1 + STREAMED, BACKWARD), CARD, "bf16", **EXACT)
    assert one_sided.seconds == pytest.approx(0.2 + 0.78, abs=0.005), "work of one pass hides no transfer of the other"


def test_bytes_in_the_cards_memory_and_the_rest():
    """20 GB at 0.8 of 250 GB/s are 0.1 s; nothing hides them."""
    speed = seconds_per_step(Work(Pass(moved_bytes=20e9), Pass()), CARD, "fp16", overhead_s=0.05)
    assert speed.seconds == pytest.approx(0.15) and "20.0 GB through its memory" in speed.explain()


def test_what_was_measured_counts():
    speed = seconds_per_step(Work(FORWARD, BACKWARD), CARD, "bf16", factor=1.5, **EXACT)
    assert speed.seconds == pytest.approx(2.19) and speed.predicted_s == pytest.approx(1.46)
    assert speed.explain() == "14.6 TFLOP at 20.0 TFLOP/s x 0.5 = 1.46 s; 0.00 s besides: 1.46 s x 1.50, as measured here"


def test_int8_is_not_credited_with_what_nobody_measured():
    plain, in_int8 = (seconds_per_step(Work(FORWARD, BACKWARD), CARD, "bf16", how) for how in ("no", "int8"))
    assert plain.seconds == in_int8.seconds and CARD.int8_tops == 4 * CARD.bf16_tflops


def test_where_nothing_is_known_nothing_is_said():
    work = Work(FORWARD + STREAMED, BACKWARD)
    for gpu, precision in ((resolve_gpu("cpu"), "no"), (resolve_gpu("RTX 2060"), "bf16"), (Gpu("card", 8, 8.6), "bf16")):
        assert seconds_per_step(work, gpu, precision) is None
    assert seconds_per_step(work, resolve_gpu("RTX 2060"), "fp16").seconds > 1
