"""Checkpoints of every optimizer go out and come back bit for bit; a damaged one is passed over aloud."""

import bitsandbytes
import pytest
import torch
from prodigyopt import Prodigy
from pytorch_optimizer import DAdaptAdam, Lion
from torch import nn
from transformers.optimization import Adafactor

from crumb.engine.network.lora import LoRALinear, Network
from crumb.engine.run.directory import create_run
from crumb.engine.train.checkpoint import load_checkpoint, prune_checkpoints, restore, save_checkpoint

BELONGS = {"plan.toml": "1", "base model": "2"}
METADATA = {"ss_base_model_version": "sdxl_base_v1-0"}
OPTIMIZERS = {
    "AdamW8bit": lambda parameters: bitsandbytes.optim.AdamW8bit(parameters, lr=1e-2, min_8bit_size=1),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    "Prodigy": lambda parameters: Prodigy(parameters, lr=1.0, d_coef=2.0, use_bias_correction=True, betas=(0.9, 0.999)),
    "DAdaptAdam": lambda parameters: DAdaptAdam(parameters, weight_decouple=True, weight_decay=0.01),
    "Adafactor": Adafactor,
    "Lion": lambda parameters: Lion(parameters, lr=1e-3),
}


def make(optimizer: str):
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(8, 6).requires_grad_(False), 4, 4.0)
    nn.init.normal_(layer.lora_A)
    network = Network({"lora_unet_middle_block_1_proj_in": layer})
    return network, OPTIMIZERS[optimizer](network.parameters()), torch.amp.GradScaler("cpu", init_scale=256.0)


def steps(network, optimizer, first: int, last: int):
    for step in range(first, last):
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(step))
        next(iter(network.layers.values()))(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_save_load_goes_on_bit_for_bit(optimizer):
    run = create_run("cat", "plan")
    network, optimiser, scaler = make(optimizer)
    steps(network, optimiser, 0, 5)
    save_checkpoint(run, 5, network, optimiser, scaler, BELONGS, {"loss_smoothed": 0.5}, "fp16", METADATA)
    steps(network, optimiser, 5, 9)

    network_2, optimiser_2, scaler_2 = make(optimizer)
    state, tensors = load_checkpoint(run, BELONGS, pytest.fail, AssertionError)
    restore(state, tensors, network_2, optimiser_2, scaler_2)
    assert (state["step"], state["progress"]["loss_smoothed"]) == (5, 0.5) and scaler_2.get_scale() == 256.0
    steps(network_2, optimiser_2, 5, 9)
    for ours, theirs in zip(network.parameters(), network_2.parameters()):
        assert torch.equal(ours, theirs), (ours - theirs).abs().max()


def test_damaged_newest_falls_back_and_foreign_is_refused():
    run = create_run("cat", "plan")
    network, optimizer, scaler = make("AdamW")
    for step in (10, 20):
        steps(network, optimizer, step - 10, step)
        save_checkpoint(run, step, network, optimizer, scaler, BELONGS, {}, "fp16", METADATA)
    damaged = run.checkpoints / "step-000020" / "state.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    warnings = []
    state, _ = load_checkpoint(run, BELONGS, warnings.append, AssertionError)
    assert state["step"] == 10 and "step-000020 is damaged" in warnings[0]
    with pytest.raises(KeyError, match="base model"):
        load_checkpoint(run, BELONGS | {"base model": "3"}, warnings.append, KeyError)


def test_pruning_keeps_the_newest_and_sweeps_what_was_half_written():
    run = create_run("cat", "plan")
    network, optimizer, scaler = make("AdamW")
    for step in (1, 2, 3):
        save_checkpoint(run, step, network, optimizer, scaler, BELONGS, {}, "fp16", METADATA)
    (run.checkpoints / ".step-000004.part").mkdir()
    prune_checkpoints(run, keep=2)
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step-000002", "step-000003"]
    prune_checkpoints(run, keep=1, best_step=2)
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step-000002", "step-000003"]
    prune_checkpoints(run, keep=1, best_step=3)
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step-000003"]


def test_a_full_disk_leaves_no_half_checkpoint_and_keeps_the_last(monkeypatch):
    run = create_run("cat", "plan")
    network, optimizer, scaler = make("AdamW")
    save_checkpoint(run, 1, network, optimizer, scaler, BELONGS, {}, "fp16", METADATA)
    written = []

    def disk(path, data):
        if written:
            raise OSError(28, "No space left on device")
        written.append(path)
        path.write_bytes(data)

    monkeypatch.setattr("crumb.engine.network.save.write_atomic", disk)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(run, 2, network, optimizer, scaler, BELONGS, {}, "fp16", METADATA)
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-000001"]
