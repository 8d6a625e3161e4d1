"""Model -> Network -> Placement: everything that the loop works with, put together as the placement says."""

import logging
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

from crumb.engine.data.prepare import TrainingSet
from crumb.engine.faults import fault
from crumb.engine.memory.placement import Placement
from crumb.engine.memory.recompute import placeable_blocks, recompute_blocks
from crumb.engine.memory.stream import stream_blocks
from crumb.engine.model.attention import choose_attention
from crumb.engine.model.config import VAE_SCALING_FACTOR
from crumb.engine.model.lean import attention_shapes, make_lean
from crumb.engine.model.load import load_text_encoders, load_unet
from crumb.engine.network.lora import Network, attach_lora
from crumb.engine.network.read import start_from
from crumb.engine.network.text import attach_text_lora
from crumb.engine.run.belonging import belongs_to_another, plan_digest
from crumb.engine.run.control import progress_reporter
from crumb.engine.run.directory import RunDirectory
from crumb.engine.run.events import EventWriter
from crumb.engine.run.status import Status
from crumb.engine.train.checkpoint import load_checkpoint, restore
from crumb.engine.train.loop import Trainer
from crumb.engine.train.noise import alphas_cumprod
from crumb.engine.train.optimizer import make_optimizer
from crumb.engine.train.parallel import Processes
from crumb.profiles.base_model import BaseModel
from crumb.profiles.plan import Plan
from crumb.profiles.preflight import steps_of_several
from crumb.profiles.verdict import Judged
from crumb.profiles.vram import RING_DEPTH

log = logging.getLogger("crumb")

VERSIONS = ("torch", "diffusers", "transformers", "safetensors")


@dataclass
class Job:
    """One run while it is worked on. `placement` and `trainer` change where memory runs out; the rest is the run's for good."""

    run: RunDirectory
    plan: Plan
    base: BaseModel
    placement: Placement
    training_set: TrainingSet
    processes: Processes
    events: EventWriter
    status: Status
    trackers: list = field(default_factory=list)
    history: list[Judged] = field(default_factory=list)
    trainer: Trainer | None = None

    @cached_property
    def belongs_to(self) -> dict[str, str]:
        """What the run's checkpoints fit, by hash."""
        return {"plan.toml": plan_digest(self.plan), "base model": self.training_set.base_sha256,
                "set of pictures and captions": self.training_set.digest()}


def assemble(job: Job) -> int:
    """Gives the job a trainer that lies in memory as its placement says; takes up the newest checkpoint, where there is one.

    Returns the last finished step.
    """
    plan, placement, processes = job.plan, job.placement, job.processes
    job.status.update(state="preparing", phase="load")
    job.events.emit("phase", phase="load")
    fault("load")
    unet, network = _place_unet(job)
    encoders = None
    if plan.text_encoders_learn:
        encoders = load_text_encoders(job.base, placement.dtype, placement.device)
        attach_text_lora(network, encoders, plan)
    optimizer = make_optimizer(plan, network.rate_groups(plan.lora_plus_ratio))
    scaler = torch.amp.GradScaler(placement.device.type, enabled=placement.dtype == torch.float16)
    job.trainer = Trainer(plan, unet, network, optimizer, scaler, job.training_set, placement,
                          alphas_cumprod(plan.zero_terminal_snr), VAE_SCALING_FACTOR, job.events, job.status, encoders,
                          processes)

    step = processes.together(lambda: _take_up(job))
    # An optimizer differs where one machine lacks the package that the plan names.
    processes.require_same(job.belongs_to | {"checkpoint to go on from": str(step), "optimizer": str(type(optimizer))})
    job.status.update(step=step)
    job.events.emit("started", pid=job.status.pid, device=_device_name(placement), step=step, steps=plan.steps,
                    versions={name: version(name) for name in VERSIONS})
    _tell_numbers(job)
    return step


def _place_unet(job: Job) -> tuple[nn.Module, Network]:
    """The U-Net with its LoRA, lying in memory as the placement says."""
    plan, placement, fit = job.plan, job.placement, job.placement.fit
    unet = load_unet(job.base, placement.dtype, placement.device, fit.quantize_base, fit.streamed,
                     base_sha256=job.training_set.base_sha256, on_progress=progress_reporter(job.run, job.events, "load"),
                     warn=lambda text: job.events.emit("warning", text=text))
    network = attach_lora(unet, plan)
    shapes = attention_shapes(unet, fit.micro_batch or plan.batch_size, plan.resolution)
    attention = choose_attention(placement.device, placement.dtype, shapes)
    log.info("attention: %s", attention.reason)
    make_lean(unet, fit.int8_activations, attention.attend)
    blocks = placeable_blocks(unet)
    recompute_blocks(block for name, block in blocks.items() if name in fit.recomputed)
    if fit.streamed:
        stream_blocks({name: block for name, block in blocks.items() if name in fit.streamed}, placement.device, RING_DEPTH)
    return unet, network


def _take_up(job: Job) -> int:
    """Puts the newest checkpoint's state, or the LoRA that the plan starts from, in place; returns the last finished step."""
    trainer = job.trainer
    found = load_checkpoint(job.run, job.belongs_to, lambda text: job.events.emit("warning", text=text), belongs_to_another)
    if found:
        state, tensors = found
        restore(state, tensors, trainer.network, trainer.optimizer, trainer.scaler)
        progress = state["progress"]
        # Older checkpoints don't say how many losses theirs averages.
        trainer.loss_smoothed, trainer.num_losses = progress["loss_smoothed"], progress.get("num_losses", state["step"])
        job.history = [Judged(**judged) for judged in progress["judged"]]
        return state["step"]
    if job.plan.start_from:
        _start_from(trainer.network, Path(job.plan.start_from), job.events)
    return 0


def _tell_numbers(job: Job) -> None:
    plan, training_set, processes = job.plan, job.training_set, job.processes
    num_regularization = len(training_set.regularization)
    job.events.emit(
        "numbers", num_pictures=len(training_set.pictures) - num_regularization, num_held_out=len(training_set.held_out),
        num_regularization=num_regularization, num_buckets=len(training_set.epoch.counts()),
        steps_per_epoch=training_set.num_batches(plan.batch_size) / plan.gradient_accumulation_steps, steps=plan.steps,
        num_parameters=job.trainer.network.num_parameters, placement=job.placement.describe(),
        num_processes=processes.count, pictures_per_step=plan.batch_size * plan.gradient_accumulation_steps)
    if processes.count > 1:
        job.events.emit("warning", text=steps_of_several(processes.count, plan.batch_size,
                                                         plan.gradient_accumulation_steps // processes.count))


def _start_from(network: Network, path: Path, events: EventWriter) -> None:
    num_filled, left_out = start_from(network, path)
    log.info("%d layers start from %s", num_filled, path)
    if left_out:
        events.emit("warning", text=f"{len(left_out)} modules of {path.name} are not trained by this plan, so their part of it "
                                    f"is left out (first: {left_out[0]}).")


def _device_name(placement: Placement) -> str:
    return torch.cuda.get_device_name() if placement.device.type == "cuda" else "cpu"
