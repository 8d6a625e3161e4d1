"""Settings that the job itself passes on: a run with one of them ends otherwise than a run without."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from crumb.engine.job import run_job
from crumb.engine.model import lean
from crumb.engine.run.directory import create_run
from crumb.engine.run.events import EventWriter, read_events
from crumb.engine.run.status import Status
from crumb.profiles.plan import dump_plan

SMALL = {"steps": 1, "resolution": 64, "batch_size": 5, "max_token_length": 75, "caption_suffix": ""}
LONG = ", ".join(f"word{n}" for n in range(60))


@pytest.fixture
def train(tiny_base, photographs, make_plan):
    """Trains two steps; returns the run and its events."""
    def train(name: str, **settings):
        plan = make_plan(**{"name": name, "base_model": str(tiny_base), "images": str(photographs), "steps": 2, "rank": 2,
                            "alpha": 2.0, "learning_rate": 1e-3, "sample_every": 0, "save_every": 1, "sample_steps": 1,
                            "sample_prompts": ["a"], "caption_suffix": LONG, "max_token_length": 150} | settings)
        return work(create_run(name, dump_plan(plan)))
    return train


def work(run):
    """From its newest checkpoint, where it has one."""
    events, status = EventWriter(run.events), Status(run)
    try:
        assert run_job(run, events, status) == 0
    finally:
        status.close()
        events.close()
    return run, read_events(run.events)[0]


def losses(events) -> list[float]:
    return [event["loss"] for event in events if event["type"] == "step"]


def weights(run) -> dict:
    with safe_open(run.result, "pt") as file:
        return {key: (str(tensor.dtype), tensor.float().sum().item()) for key in file.keys()  # noqa: SIM118
                for tensor in [file.get_tensor(key)]}


def test_what_is_learned_follows_each_of_them(train):
    plain_run, plain_events = train("plain", save_every=0, judge_every=0, sample_every=0)
    assert [event["step"] for event in plain_events if event["type"] == "judged"] == [0, 2], "0 is the first and last alone"
    assert not list(plain_run.checkpoints.iterdir()) and not any(event["type"] == "sample" for event in plain_events)
    same_run, same_events = train("same")
    assert losses(same_events) == losses(plain_events) and weights(same_run) == weights(plain_run)
    for number, setting in enumerate([
            {"clip_skip": 3}, {"max_token_length": 75}, {"zero_terminal_snr": True}, {"resolution": 192},
            {"caption_dropout": 1.0}, {"loss_weighting": "min_snr", "min_snr_gamma": 0.1},
            {"multires_noise_iterations": 6}, {"timestep_max": 200}]):
        run, events = train(f"first-{number}", **setting)
        assert losses(events)[0] != losses(plain_events)[0], setting
    for number, setting in enumerate([
            {"lora_plus_ratio": 8.0}, {"scheduler": "constant_with_warmup", "warmup_ratio": 1.0}, {"max_norm": 0.001},
            {"block_rates": {"MID": 0}}, {"save_precision": "bf16"}, {"optimizer": "Lion"}, {"max_grad_norm": 1e-4}]):
        run, events = train(f"second-{number}", **setting)
        assert losses(events)[0] == losses(plain_events)[0] and weights(run) != weights(plain_run), setting


def test_convolutions_of_a_block_take_its_rank_and_alpha(train):
    conv = {"targets": "attention+ff+conv", "conv_rank": 2, "conv_alpha": 2.0}
    plain, _ = train("conv", **conv)
    layer = "lora_unet_input_blocks_1_0_in_layers_2.lora_"
    for setting, rank in (({"conv_block_ranks": {"IN01": 5}}, 5), ({"conv_block_alphas": {"IN01": 8.0}}, 2)):
        run, _ = train(next(iter(setting)), **conv, **setting)
        with safe_open(run.result, "pt") as file:
            assert file.get_tensor(f"{layer}down.weight").shape[0] == rank
            assert file.get_tensor(f"{layer}up.weight").shape[1] == rank
        assert weights(run)[f"{layer}up.weight"] != weights(plain)[f"{layer}up.weight"], setting


def test_what_is_written_follows_each_of_them(train):
    run, events = train("written", keep_checkpoints=1, sample_every=1, judge_every=2, trackers=["tensorboard"], steps=4,
                        save_precision="bf16")
    assert [path.name for path in sorted(run.checkpoints.iterdir())] == ["step-000003"]
    assert [event["step"] for event in events if event["type"] == "judged"] == [0, 2, 4]
    assert [event["step"] for event in events if event["type"] == "sample"] == [0, 1, 2, 3, 4]
    assert any((run.path / "trackers").rglob("events.out*"))
    (in_checkpoint,) = run.checkpoints.glob("step-*/written-*.safetensors")
    assert {tensor.dtype for file in (in_checkpoint, run.result) for tensor in load_file(file).values()} == {torch.bfloat16}


def test_gradient_checkpointing_computes_every_block_twice(train, monkeypatch):
    """The tiny U-Net has 2 + 4 transformer blocks on its way down, 2 in the middle and 6 + 3 on its way up."""
    called, compute = [], lean.transformer_block

    def count(block, *args):
        if torch.is_grad_enabled():  # measurements take no gradients
            called.append(block)
        return compute(block, *args)

    monkeypatch.setattr(lean, "transformer_block", count)
    _, kept = train("kept", gradient_checkpointing=False, **SMALL)
    num_kept = len(called)
    _, recomputed = train("recomputed", gradient_checkpointing=True, **SMALL)
    assert (num_kept, len(called) - num_kept) == (17, 2 * 17)
    assert losses(kept) == losses(recomputed)


def test_the_smoothed_loss_goes_on_where_a_checkpoint_left_it(train):
    """Also where an older one does not say how many losses it averages; where steps were dropped they are fewer."""
    run, events = train("resumed", **SMALL | {"steps": 3, "save_every": 2, "gradient_accumulation_steps": 2})
    _, second, third = steps = [event for event in events if event["type"] == "step"]
    (numbers,) = [event for event in events if event["type"] == "numbers"]
    # Six pictures of one size are two batches of five at most, which one step takes both.
    assert (numbers["pictures_per_step"], numbers["steps_per_epoch"], third["epoch"]) == (10, 1.0, 3.0)
    file = run.checkpoints / "step-000002" / "state.json"
    state = json.loads(file.read_text())
    assert state["progress"]["num_losses"] == 2 and len(steps) == 3
    without_number = {name: value for name, value in state["progress"].items() if name != "num_losses"}
    share = 0.02 / (1 - 0.98**2)
    one_dropped = second["loss_smoothed"] + share * (third["loss"] - second["loss_smoothed"])
    for progress, expected in [(state["progress"], third["loss_smoothed"]), (without_number, third["loss_smoothed"]),
                               (without_number | {"num_losses": 1}, one_dropped)]:
        file.write_text(json.dumps(state | {"progress": progress}))
        _, events = work(run)
        last = [event for event in events if event["type"] == "step"][-1]
        assert last["step"] == 3 and last["loss"] == third["loss"]
        assert last["loss_smoothed"] == expected, (last, progress)


def test_a_smaller_base_and_smaller_activations_reach_the_run(train):
    described = {}
    for name, settings in {"exact": {}, "int8": {"quantize_base": "int8"}, "nf4": {"quantize_base": "nf4"},
                           "kept": {"int8_activations": True}}.items():
        _, events = train(name, gradient_checkpointing=False, **SMALL | {"steps": 3} | settings)
        (numbers,) = [event for event in events if event["type"] == "numbers"]
        described[name] = numbers["placement"], losses(events)
    exact = described["exact"][1]
    assert "base in int8, computed in float32" in described["int8"][0] and "base in nf4" in described["nf4"][0]
    assert "in part as int8" in described["kept"][0] and described["exact"][0] == "base in float32 on cpu, activations kept"
    # The first loss is of the base alone: rounding the base shows in it, rounding what is kept for backward can't.
    assert described["int8"][1][0] != exact[0] == described["kept"][1][0] and described["kept"][1][1:] != exact[1:]
    for name in ("int8", "nf4"):
        assert described[name][1] == pytest.approx(exact, rel=0.05), (name, described[name][1], exact)
