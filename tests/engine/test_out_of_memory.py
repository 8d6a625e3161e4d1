"""Memory that runs out, at every place where it can: the run goes on with less and ends as one that began there."""

import pytest
import torch
from safetensors.torch import load_file

from crumb.engine import faults
from crumb.engine.job import run_job
from crumb.engine.memory.count import block_names
from crumb.engine.memory.fitting import load_fit, save_fit
from crumb.engine.memory.ladder import next_rung
from crumb.engine.model.tiny import TINY, unet_config
from crumb.engine.run.directory import create_run
from crumb.engine.run.events import EventWriter, read_events
from crumb.engine.run.status import Status
from crumb.profiles.errors import CrumbError
from crumb.profiles.fit import Fit
from crumb.profiles.plan import dump_plan

BLOCKS = frozenset(block_names(unet_config(TINY)))
LARGE = 2**40
QUIET = {"steps": 2, "sample_every": 0, "judge_every": 0}


@pytest.fixture
def train(tiny_base, photographs, make_plan, monkeypatch):
    """Trains three steps of two pictures with faults at the places named; returns the run and its events."""
    def train(name: str, places: list[str] = (), fit: Fit | None = None, **settings):
        plan = make_plan(**{"name": name, "base_model": str(tiny_base), "images": str(photographs), "steps": 3, "rank": 2,
                            "alpha": 2.0, "learning_rate": 1e-3, "resolution": 64, "batch_size": 2, "save_every": 0,
                            "sample_every": 2, "judge_every": 2, "sample_steps": 1, "sample_prompts": ["a"],
                            "gradient_checkpointing": False} | settings)
        run = create_run(name, dump_plan(plan))
        if fit:
            save_fit(run, fit)
        monkeypatch.setattr(faults, "_left", [f"out of memory: {place}" for place in places])
        monkeypatch.setattr("crumb.engine.memory.fitting.host_memory_bytes", lambda: LARGE)
        events, status = EventWriter(run.events), Status(run)
        try:
            assert run_job(run, events, status) == 0
        finally:
            status.close()
            events.close()
        assert not faults._left, f"never came to {faults._left}"
        return run, read_events(run.events)[0]
    return train


def steps(events) -> list[tuple]:
    return [(event["step"], event["loss"]) for event in events if event["type"] == "step"]


def told(events) -> list[str]:
    return [event["text"] for event in events if event["type"] == "warning"]


def test_wherever_memory_runs_out_the_run_ends_as_one_that_never_did(train):
    """The first rungs cost only time, so the result is the same to the last bit. No step is made twice."""
    plain_run, plain = train("plain")
    for place in ("load", "fit check", "step 3", "backward", "optimizer", "judge 2"):
        run, events = train(place.replace(" ", "-"), [place])
        assert steps(events) == steps(plain), place
        assert [event["step"] for event in events if event["type"] == "judged"] == [0, 2, 3], place
        (text,) = told(events)
        assert "goes on from there with less: 17 of 34 blocks compute" in text, text
        same_files(run, plain_run)
        assert load_fit(run).recomputed < BLOCKS


def test_sampling_and_encoding_without_room_end_on_the_processor(train):
    plain_run, plain = train("plain-samples")
    run, events = train("samples", ["cache latents", "cache captions", "decode"], caption_suffix="anew", resolution=192)
    assert not any("ampling" in text for text in told(events))
    assert len(list(run.samples.glob("*.png"))) == len(list(plain_run.samples.glob("*.png"))) > 0
    run, events = train("no-sample", ["sample 2"])
    assert ["Sampling at step 2 failed" in text for text in told(events)] == [True] and steps(events) == steps(plain)
    same_files(run, plain_run)


def test_down_the_whole_ladder_and_the_end_of_it(train):
    """Rungs until only the base's format is left; from the fit check, so that all of the run is made as the last one says."""
    fit, reached = Fit(micro_batch=2), []
    while rung := next_rung(fit, sorted(BLOCKS), may_stream=True):
        fit = rung[0]
        reached.append(fit)
    assert [fit.micro_batch for fit in reached].count(2) == len(reached) - 3 and reached[-1].quantize_base == "nf4"
    assert reached[-3].recomputed == reached[-3].streamed == BLOCKS and reached[-3].quantize_base == "no"
    for number, wanted in enumerate(reached):
        if number >= len(reached) - 3:
            run, events = train(f"down-{number}", ["fit check"] * (number + 1), **QUIET)
            found = load_fit(run)
            assert (found.quantize_base, len(found.recomputed), len(found.streamed), found.micro_batch) == (
                wanted.quantize_base, len(wanted.recomputed), len(wanted.streamed), wanted.micro_batch)
            assert len(told(events)) == number + 1
            there, from_there = train(f"there-{number}", fit=found, **QUIET)
            assert steps(from_there) == steps(events) and not told(from_there)
            same_files(run, there)
    with pytest.raises(CrumbError, match=r"nothing is left to give up .*resolution = .* GiB with rank = 1"):
        train("bottom", ["fit check"] * (len(reached) + 1), **QUIET)


def test_a_run_that_had_to_give_something_up_goes_on_so_when_it_is_resumed(train):
    run, _ = train("resumed", ["step 2"], steps=2)
    before = load_fit(run)
    run.plan.write_text(run.plan.read_text().replace("steps = 2", "steps = 3"))
    # Another length is another plan; what is looked at here is how it lies in memory.
    for folder in run.checkpoints.glob("step-*"):
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    events_file, status = EventWriter(run.events), Status(run)
    try:
        assert run_job(run, events_file, status) == 0
    finally:
        status.close()
        events_file.close()
    placements = [event for event in read_events(run.events)[0] if event["type"] == "placement"]
    assert placements[-1]["costs"] == ["as this run had to do before"] and load_fit(run) == before


def test_where_the_host_has_no_room_nothing_is_streamed():
    fit, texts = Fit(recomputed=BLOCKS, micro_batch=2), []
    while rung := next_rung(fit, sorted(BLOCKS), may_stream=False):
        fit = rung[0]
        texts.append(rung[1])
    assert not fit.streamed and [text.split()[0] for text in texts] == ["1", "the", "the"]


def same_files(run, other) -> None:
    found, expected = load_file(run.result), load_file(other.result)
    assert found.keys() == expected.keys()
    different = [key for key in found if not torch.equal(found[key], expected[key])]
    assert not different, f"{len(different)} of {len(found)} tensors differ, first {different[0]}"
