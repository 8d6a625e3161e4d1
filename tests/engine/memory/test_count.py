"""Bytes of the full-size U-Net's step on fake tensors: within the budget, and as the table in profiles/ says."""

import dataclasses

import pytest

from crumb.engine.memory.count import count_step, num_weights
from crumb.engine.model.tiny import SDXL, unet_config
from crumb.profiles.fit import Fit
from crumb.profiles.memory_table import load_table
from crumb.profiles.plan import TARGETS
from crumb.profiles.vram import Demand, activation_bytes, walk

MIB = 2**20
CONFIG = unet_config(SDXL)
FULL = {"rank": 16, "resolution": 1024, "batch_size": 1, "mixed_precision": "bf16", "device": "auto"}


@pytest.mark.parametrize(("settings", "recompute", "limit_mib"), [
    ({}, lambda number: False, 3900),
    ({}, lambda number: True, 580),
    ({"rank": 64, "int8_activations": True, "resolution": 768}, lambda number: number % 3 == 0, 1420),
    ({"targets": "attention+ff+conv", "conv_rank": 32, "rank": 32, "batch_size": 2, "resolution": 512},
     lambda number: number > 43, 1480)], ids=["kept", "recomputed", "mixed", "convolutions"])
def test_a_step_takes_what_the_table_says_and_no_more_than_its_budget(make_plan, settings, recompute, limit_mib):
    plan = make_plan(**FULL | settings)
    table = load_table(plan.targets)
    recomputed = frozenset(name for number, name in enumerate(table.blocks) if recompute(number))
    counted = count_step(CONFIG, plan, recomputed)
    fit = Fit("no", plan.int8_activations, recomputed, micro_batch=plan.batch_size)
    predicted = activation_bytes(table, Demand.of(plan), fit)
    assert counted.peak_bytes < limit_mib * MIB, f"{counted.peak_bytes / MIB:.0f} MiB"
    assert predicted == pytest.approx(counted.peak_bytes, rel=0.02), f"{predicted / MIB:.0f}, {counted.peak_bytes / MIB:.0f}"
    flops = sum(span.flops + span.attention_flops for part in (counted.forward, counted.backward) for span in part.values())
    by_table = sum(span.flops + span.attention_flops for span in walk(table, Demand.of(plan), fit))
    assert by_table == pytest.approx(flops, rel=0.02), f"{by_table / 1e12:.2f}, {flops / 1e12:.2f} TFLOP"


def test_weights_are_those_of_the_unet():
    for targets in TARGETS:
        assert load_table(targets).weights == num_weights(CONFIG)
    assert sum(sum(dataclasses.astuple(of_block)) for of_block in load_table("attention").weights.values()) == 2_567_463_684
