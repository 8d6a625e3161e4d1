"""Fitting a full-size SDXL into a GPU's free memory, with a GPU that only says how much it has."""

from pathlib import Path

import pytest
import torch

from crumb.engine.memory import fitting
from crumb.engine.memory.fitting import fit_into_memory, load_fit, one_rung_down, predicted_bytes, save_fit
from crumb.engine.memory.placement import Placement
from crumb.engine.run.directory import RunDirectory
from crumb.profiles.base_model import BaseModel
from crumb.profiles.errors import CrumbError
from crumb.profiles.fit import Fit
from crumb.profiles.hardware import resolve_gpu
from crumb.profiles.vram import CONTEXT_BYTES

GIB = 2**30
BASE = BaseModel(Path("sdxl.safetensors"), "single_file", "fp16", "epsilon", "", False, True, 2_567_463_684, 1024)
FULL = {"rank": 16, "resolution": 1024, "batch_size": 1, "mixed_precision": "bf16", "device": "cuda", "optimizer": "AdamW8bit",
        "gradient_checkpointing": True}


@pytest.fixture
def gpu(monkeypatch):
    """Gives the GPU that much free memory, of 12 GiB, and the host that much; returns the caps set."""
    caps = []

    def has(free_gib: float, host_gib: float = 32.0) -> list[float]:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(free_gib * GIB), 12 * GIB))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 0)
        monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", caps.append)
        monkeypatch.setattr(fitting, "host_memory_bytes", lambda: int(host_gib * GIB))
        monkeypatch.setattr(fitting, "resolve_gpu", lambda _: resolve_gpu("RTX 3060 12GB"))
        return caps
    return has


def placed(plan) -> Placement:
    return Placement(torch.device("cuda"), torch.bfloat16, Fit(plan.quantize_base, plan.int8_activations, micro_batch=1))


@pytest.mark.parametrize(("free_gib", "host_gib"), [(11.5, 32), (7, 32), (5, 32), (3, 32), (7, 2), (4, 2)])
def test_what_is_free_is_enough_and_the_allocator_is_kept_to_it(gpu, make_plan, tmp_path, free_gib, host_gib):
    caps, plan = gpu(free_gib, host_gib), make_plan(**FULL)
    placement, costs = fit_into_memory(placed(plan), plan, BASE, RunDirectory(tmp_path))
    taken = predicted_bytes(placement, plan, BASE)
    assert taken <= free_gib * GIB and costs
    assert caps == [pytest.approx((free_gib - 0.15) / 12)], "torch may take what is free, less what is left to others"
    assert bool(placement.fit.streamed) <= (host_gib > 3)
    if (free_gib, host_gib) == (4, 2):  # neither exact nor streamed: a coarser base, and that is said
        assert placement.fit.quantize_base != "no" and "does not fit into what is free" in costs[0]
    else:
        assert placement.fit.quantize_base == "no"


def test_a_plan_may_ask_for_less_than_is_free(gpu, make_plan, tmp_path):
    caps, plan = gpu(11.5), make_plan(**FULL, vram_gib=6.0)
    placement, _ = fit_into_memory(placed(plan), plan, BASE, RunDirectory(tmp_path))
    assert predicted_bytes(placement, plan, BASE) + CONTEXT_BYTES <= 6 * GIB and caps[-1] < 0.5


def test_what_fits_nowhere_is_tried_and_its_end_says_what_would(gpu, make_plan, tmp_path):
    plan, run = make_plan(**FULL), RunDirectory(tmp_path)
    gpu(0.8)
    placement, costs = fit_into_memory(placed(plan), plan, BASE, run)
    assert "it is tried nevertheless" in costs[0]

    class Events:
        texts: list[str] = []

        def emit(self, _, text):
            self.texts.append(text)

    with pytest.raises(CrumbError, match=r"nothing is left to give up .* GiB with resolution = 512 and .* GiB with rank = 8"):
        for _ in range(20):
            placement, _ = one_rung_down(placement, plan, BASE, run, "none", "fit", 0, Events())
            assert load_fit(run) == placement.fit


def test_what_was_given_up_is_remembered_and_a_torn_file_is_as_none(gpu, make_plan, tmp_path):
    plan, run = make_plan(**FULL), RunDirectory(tmp_path)
    gpu(11.5)
    less = Fit("int8", False, frozenset(["a"]), frozenset(["b"]), 1)
    save_fit(run, less)
    assert fit_into_memory(placed(plan), plan, BASE, run)[0].fit == less
    run.fit.write_text("{")
    assert fit_into_memory(placed(plan), plan, BASE, run)[0].fit == Fit(micro_batch=1)
