"""The training loop: set the rate, accumulate gradients, clip, step, report, save, sample, look for requests."""

import math
import time
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from crumb.engine.data.order import epoch_batches, mirrored_views
from crumb.engine.data.prepare import Batch, TrainingSet, load_entry
from crumb.engine.faults import fault
from crumb.engine.memory.placement import Placement
from crumb.engine.model.load import TextEncoders
from crumb.engine.network.lora import Network
from crumb.engine.run.events import EventWriter
from crumb.engine.run.status import Status
from crumb.engine.train.noise import step_generator
from crumb.engine.train.optimizer import clip_gradients, effective_rate
from crumb.engine.train.parallel import Processes
from crumb.engine.train.schedule import learning_rate_factor
from crumb.engine.train.step import draw, forward_loss
from crumb.engine.train.text import encode_batch, encode_texts, text_learns
from crumb.profiles.errors import CrumbError
from crumb.profiles.plan import Plan

LOSS_SMOOTHING = 0.98
"""What each step's loss counts beside the next one's in the smoothed loss; about the last 50 steps count."""

MAX_SKIPPED_IN_A_ROW = 25
"""fp16's loss scale needs up to 16 halvings to find its level; more than this is no search but a broken run."""


@dataclass
class Trainer:
    """Everything the loop works with; the tensors among it change in place."""

    plan: Plan
    unet: nn.Module
    network: Network
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    training_set: TrainingSet
    placement: Placement
    schedule: Tensor
    scaling_factor: float
    events: EventWriter
    status: Status
    encoders: TextEncoders | None = None
    """Kept where they learn; otherwise every text comes from the cache."""
    processes: Processes = Processes()
    loss_smoothed: float | None = None
    num_losses: int = 0
    """Steps that it averages: all but the dropped ones."""
    skipped_in_a_row: int = 0

    def prompt_entries(self, texts: list[str]) -> dict[str, dict[str, Tensor]]:
        """Each text's conditioning as it is now."""
        if self.encoders:
            return encode_texts(texts, self.encoders, self.plan)
        return {text: load_entry(self.training_set.prompt_paths[text]) for text in texts}

    def train_step(self, step: int) -> dict:
        """One optimizer step (0-based `step`); returns the fields of its `step` event."""
        plan = self.plan
        started = time.perf_counter()
        learning_rate = plan.learning_rate * learning_rate_factor(plan.scheduler, step, plan.steps, plan.warmup_ratio)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["rate_factor"]
        self.network.train(True, text_learns(plan, step))
        loss, num_pictures, data_wait_s = self._accumulate_gradients(step)
        self.network.train(False)
        grad_norm = self._apply_gradients(loss)
        skipped = self.skipped_in_a_row > 0
        if not skipped:
            self._smooth(loss)
        seconds = time.perf_counter() - started
        fields = {
            "step": step + 1, "epoch": self._epoch(step), "loss": _finite(loss), "loss_smoothed": self.loss_smoothed,
            "learning_rate": effective_rate(self.optimizer, learning_rate), "grad_norm": _finite(grad_norm),
            "seconds": round(seconds, 4), "images_per_s": round(num_pictures / seconds, 3),
            "data_wait_s": round(data_wait_s, 4), **self._vram(),
        }
        return fields | {"skipped": True} if skipped else fields

    def _accumulate_gradients(self, step: int) -> tuple[float, int, float]:
        """Adds up the gradients of all passes of a step; returns mean loss, pictures seen, seconds spent on data."""
        plan = self.plan
        loss_sum, num_pictures, data_wait_s = 0.0, 0, 0.0
        # The plan's passes are those of all processes together; each takes its turn of them.
        for micro_step in range(self.processes.rank, plan.gradient_accumulation_steps, self.processes.count):
            started = time.perf_counter()
            # Dropout's draws must depend neither on how often the run was stopped nor on which process makes this pass.
            torch.manual_seed(step_generator(plan.seed, step, -1 - 2 * micro_step).initial_seed())
            indices = self._batch_indices(step * plan.gradient_accumulation_steps + micro_step)
            batch = self.training_set.batch(indices, mirrored_views(len(indices), plan.seed, step, micro_step),
                                            view=f"{step} {micro_step}")
            drawn = draw(batch, plan, self.schedule, self.scaling_factor, step_generator(plan.seed, step, micro_step))
            fault(f"step {step + 1}")
            data_wait_s += time.perf_counter() - started
            loss_sum += self._pass(batch, *drawn, text_learns(plan, step))
            num_pictures += len(indices)
        loss_sum, num_pictures = self.processes.add_up(self.network.parameters(), loss_sum, num_pictures)
        return loss_sum / plan.gradient_accumulation_steps, num_pictures, data_wait_s

    def _pass(self, batch: Batch, noisy_latents: Tensor, target: Tensor, timesteps: Tensor, text_learns: bool) -> float:
        """Adds the gradients of a batch's mean loss, a few pictures at a time where memory asks for it; returns the loss."""
        loss_sum, size = 0.0, self.placement.fit.micro_batch or len(timesteps)  # 0 is all
        for start in range(0, len(timesteps), size):
            some = slice(start, start + size)
            part = batch.part(some)
            if self.encoders:
                part = encode_batch(part, self.encoders, self.plan, text_learns)
            losses = forward_loss(self.unet, part, noisy_latents[some], target[some], timesteps[some], self.schedule, self.plan,
                                  self.placement)
            # Over the number of pictures, not over their weights (as sd-scripts): one of weight 0.1 counts a tenth of another.
            loss = (losses * part.weights.to(losses.device)).sum() / len(timesteps)
            self.scaler.scale(loss / self.plan.gradient_accumulation_steps).backward()
            loss_sum += loss.item()
            fault("backward")
        return loss_sum

    def rehearse(self) -> None:
        """A pass of the largest pictures whose gradients are thrown away: it takes the memory that training will take."""
        plan, crops = self.plan, self.training_set.crops
        largest = max(self.training_set.trained, key=lambda index: crops[index].width * crops[index].height)
        batch = self.training_set.batch([largest] * (self.placement.fit.micro_batch or plan.batch_size))
        drawn = draw(batch, plan, self.schedule, self.scaling_factor, step_generator(plan.seed, 0, 0))
        self.network.train(True, text_learns(plan, 0))
        self._pass(batch, *drawn, text_learns(plan, 0))
        self.network.train(False)
        self.optimizer.zero_grad(set_to_none=True)

    def _apply_gradients(self, loss: float) -> float:
        """Clips and steps; NaN or Inf drops the step, counted, and ends the run when it persists. Returns the norm."""
        parameters = self.network.parameters()
        self.scaler.unscale_(self.optimizer)
        max_norm = self.plan.max_grad_norm or math.inf
        grad_norm = clip_gradients(self.optimizer, parameters, max_norm)
        if math.isfinite(loss) and math.isfinite(grad_norm):
            fault("optimizer")
            self.scaler.step(self.optimizer)
            if self.plan.max_norm:
                self.network.limit_norms(self.plan.max_norm)
            self.skipped_in_a_row = 0
        else:
            self.skipped_in_a_row += 1
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.skipped_in_a_row > MAX_SKIPPED_IN_A_ROW:
            raise CrumbError(
                f"Loss or gradients were NaN or infinite for {self.skipped_in_a_row} steps in a row (last loss {loss}). "
                f"Start a new run with a lower learning rate ({self.plan.learning_rate:g} now) or mixed_precision = "
                f"\"bf16\" or \"no\" ({self.plan.mixed_precision} now). What the checkpoints hold was saved before this.")
        return grad_norm

    def _smooth(self, loss: float) -> None:
        """Takes a step's loss into the smoothed one: Adam's average, corrected for its start (Kingma & Ba 2015, section 3).

        As a mean that is moved on, which needs no uncorrected average beside it: where few losses are known, each counts more.
        """
        self.num_losses += 1
        weight = (1 - LOSS_SMOOTHING) / (1 - LOSS_SMOOTHING**self.num_losses)
        self.loss_smoothed = loss if self.loss_smoothed is None else self.loss_smoothed + weight * (loss - self.loss_smoothed)

    def _batch_indices(self, number: int) -> list[int]:
        num_batches = self.training_set.num_batches(self.plan.batch_size)
        epoch, position = divmod(number, num_batches)
        return _epoch_order(self.training_set, self.plan.batch_size, self.plan.seed, epoch)[position]

    def _epoch(self, step: int) -> float:
        num_batches = self.training_set.num_batches(self.plan.batch_size)
        return round((step + 1) * self.plan.gradient_accumulation_steps / num_batches, 3)

    def _vram(self) -> dict[str, int]:
        if self.placement.device.type != "cuda":
            return {}
        return {"vram_allocated_bytes": torch.cuda.memory_allocated(),
                "vram_reserved_bytes": torch.cuda.memory_reserved(),
                "vram_peak_bytes": torch.cuda.max_memory_reserved()}


@lru_cache(2)
def _epoch_order(training_set: TrainingSet, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    return epoch_batches(training_set.epoch.buckets(epoch), batch_size, seed, epoch)


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
