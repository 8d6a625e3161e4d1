"""The solver: what it finds fits, takes no more than it must, and is the fastest of what there is."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crumb.engine.memory.ladder import next_rung
from crumb.profiles.fit import Fit
from crumb.profiles.hardware import resolve_gpu
from crumb.profiles.memory_table import load_table
from crumb.profiles.plan import TARGETS
from crumb.profiles.solver import (
    Machine,
    choose,
    explain,
    fastest_fit,
    measure,
    recompute_order,
    smallest_fit,
    streamed_bytes,
    total_bytes,
)
from crumb.profiles.vram import STATE_BYTES, Demand

GIB = 2**30
TABLE = load_table("attention+ff")
DEMAND = Demand("attention+ff", 16, 0, "AdamW8bit", 1024, 1)
CARD = resolve_gpu("RTX 3060 12GB")


def machine(gpu_gib: float, host_gib: float = 16, gpu=CARD) -> Machine:
    return Machine(gpu, gpu_gib * GIB, host_gib * GIB)


@settings(deadline=None, max_examples=60)
@given(targets=st.sampled_from(TARGETS), rank=st.integers(4, 128), optimizer=st.sampled_from(sorted(STATE_BYTES)),
       resolution=st.sampled_from([512, 768, 1024, 1280]), batch_size=st.integers(1, 4), gpu_gib=st.floats(1.5, 24),
       host_gib=st.floats(0, 16), start=st.builds(Fit, st.sampled_from(["no", "int8", "nf4"]), st.booleans()),
       recompute=st.booleans())
def test_what_is_found_fits_and_takes_no_block_too_many(targets, rank, optimizer, resolution, batch_size, gpu_gib, host_gib,
                                                        start, recompute):
    table, here = load_table(targets), machine(gpu_gib, host_gib)
    demand = Demand(targets, rank, rank // 2 if "conv" in targets else 0, optimizer, resolution, batch_size)
    found = fastest_fit(table, demand, here, start, recompute)
    if found is None:
        least = smallest_fit(table, demand, start, recompute, stream=host_gib > 15)
        assert total_bytes(table, demand, least) > 0.9 * here.gpu_bytes  # a ring takes more where only a part is streamed
        return
    fit = found.fit
    assert total_bytes(table, demand, fit) == found.peak_bytes <= here.gpu_bytes
    assert streamed_bytes(table, demand, fit) <= here.host_bytes and (recompute or not fit.recomputed)
    if fit.recomputed:
        last = [name for name in recompute_order(table, demand, fit) if name in fit.recomputed][-1]
        assert total_bytes(table, demand, replace(fit, recomputed=fit.recomputed - {last})) > here.gpu_bytes


def test_the_largest_card_pays_nothing_and_the_smallest_everything():
    free = fastest_fit(TABLE, DEMAND, machine(24), Fit())
    assert free.fit == Fit(micro_batch=1)
    assert explain(TABLE, DEMAND, machine(24), free.fit) == [
        "nothing: all activations are kept and all of the base stays on the GPU"]
    least = smallest_fit(TABLE, DEMAND, Fit("int8"))
    assert total_bytes(TABLE, DEMAND, least) < 1.75 * GIB and len(least.streamed) == len(least.recomputed) == 87
    assert fastest_fit(TABLE, DEMAND, machine(1.5), Fit("int8")) is None


def test_memory_is_paid_for_with_what_costs_least_time():
    """At 1024 pixels PCI Express 4.0 x16 hides behind the arithmetic, x1 does not; without host memory nothing streams."""
    streams = fastest_fit(TABLE, DEMAND, machine(7), Fit())
    assert streams.fit.streamed and not streams.fit.recomputed
    slow = fastest_fit(TABLE, DEMAND, machine(7, gpu=replace(CARD, pcie_lanes=1)), Fit())
    assert slow.fit.recomputed and not slow.fit.streamed and slow.seconds > streams.seconds
    assert fastest_fit(TABLE, DEMAND, machine(7, host_gib=0), Fit()).fit == slow.fit
    lines = explain(TABLE, DEMAND, machine(7, host_gib=0), slow.fit)
    assert len(lines) == 1 and f"{len(slow.fit.recomputed)} of 87 blocks recomputed: +" in lines[0] and "GiB" in lines[0]


def test_a_batch_is_cut_only_where_no_block_helps_any_more():
    four = replace(DEMAND, batch_size=4)
    enough = fastest_fit(TABLE, four, machine(5), Fit())
    assert enough.fit.micro_batch == 4
    cut = fastest_fit(TABLE, four, machine(2.6), Fit())
    assert cut.fit.micro_batch < 4 and f"{cut.fit.micro_batch} of a batch's 4 pictures at a time" in explain(
        TABLE, four, machine(2.6), cut.fit)
    one_pass, two = (measure(TABLE, four, machine(24), Fit(micro_batch=size)).speed.work for size in (4, 2))
    assert two.forward.flops == pytest.approx(one_pass.forward.flops, rel=0.01)


def test_an_exact_base_is_taken_unless_a_coarser_one_is_clearly_faster():
    assert choose(TABLE, DEMAND, lambda _: machine(12)).fit == Fit(micro_batch=1)
    slow_link = replace(CARD, pcie_lanes=1)
    coarse = choose(TABLE, DEMAND, lambda _: machine(5, gpu=slow_link))
    assert coarse.fit.quantize_base in ("int8", "nf4") and coarse.seconds < fastest_fit(
        TABLE, DEMAND, machine(5, gpu=slow_link), Fit()).seconds / 1.05
    wanted = choose(TABLE, DEMAND, lambda _: machine(7, gpu=slow_link), quantize_base="no", int8_activations=False)
    assert (wanted.fit.quantize_base, wanted.fit.int8_activations) == ("no", False)
    assert choose(TABLE, DEMAND, lambda _: machine(1)) is None


def test_what_this_machine_measured_changes_seconds_and_not_the_choice():
    plain, slower = (fastest_fit(TABLE, DEMAND, replace(machine(7), factor=factor), Fit()) for factor in (1.0, 1.7))
    assert slower.fit == plain.fit and slower.seconds == pytest.approx(1.7 * plain.seconds)


def test_a_card_of_which_nothing_is_known_still_gets_a_fit():
    unknown = resolve_gpu("auto", 8.0)
    found = fastest_fit(TABLE, DEMAND, machine(7, gpu=replace(unknown, bf16_tflops=0.0)), Fit())
    assert found.seconds is None and found.peak_bytes <= 7 * GIB and explain(TABLE, DEMAND, machine(7), found.fit)


def test_every_rung_of_the_ladder_takes_less_than_the_one_before():
    demand, fit = replace(DEMAND, batch_size=4), Fit(micro_batch=4)
    blocks = [*recompute_order(TABLE, demand, fit)]
    blocks += [name for name in TABLE.blocks if name not in blocks]
    peaks = [total_bytes(TABLE, demand, fit)]
    while rung := next_rung(fit, blocks, may_stream=True):
        fit = rung[0]
        peaks.append(total_bytes(TABLE, demand, fit))
    assert all(later < before for before, later in pairwise(peaks)), [f"{peak / GIB:.2f}" for peak in peaks]
    assert fit == Fit("nf4", False, frozenset(TABLE.blocks), frozenset(TABLE.blocks), 1)
    assert peaks[-1] < 1.75 * GIB < 9.7 * GIB < peaks[0]
