"""Several processes that train one LoRA together, each on its own GPU: who does what, and their gradients added up.

Pass m of process r of N is pass m * N + r of the step, with the pictures and the noise that one process with N times the
gradient accumulation would give it. So N processes add up the same sum, and nothing else in the loop has to know of them.

torch.distributed through accelerate, and only where a launcher started several processes: one alone pays nothing.
"""

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor, distributed

from crumb.engine.run.launch import launched_as
from crumb.profiles.errors import CrumbError, RequestError

Result = TypeVar("Result")

WAIT = timedelta(hours=6)
"""How long one waits for the others: the first draws sample pictures meanwhile. A process that dies is noticed at once."""

WEIGHTS_COMPARED_EVERY = 100
"""Steps between two looks whether all processes still have the same weights."""

MAX_DRIFT = 1e-4
"""Relative difference of the weights' sums; unlike GPUs round differently, lost gradients make far more."""


def _among_all(method: Callable) -> Callable:
    """Turns the error of a connection that is gone into a sentence."""

    @functools.wraps(method)
    def wrapped(*arguments, **keywords):
        try:
            return method(*arguments, **keywords)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise CrumbError(f"Another process of this run ended or can't be reached any more. What it said is in the log, "
                             f"above this. Mend that, then `crumb resume` with the same number of GPUs. ({error})") from error

    return wrapped


@dataclass(frozen=True)
class Processes:
    """This process among all of its run, and among those on its own machine. The default: alone."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1

    @property
    def is_first(self) -> bool:
        """The first alone writes to the run's folder and takes requests."""
        return self.rank == 0

    @property
    def share(self) -> tuple[int, int]:
        """Which part of this machine's cache entries is made here: every `share[1]`-th from `share[0]` on."""
        return self.local_rank, self.local_count

    def together(self, work: Callable[[], Result]) -> Result:
        """Does the work and waits until all have done theirs; what was wrong in one of them is raised in all."""
        if self.count == 1:
            return work()
        result, error = None, None
        try:
            result = work()
        except CrumbError as found:
            error = found
        for found in self._gather(error):
            if found is not None:
                raise found
        return result

    @_among_all
    def first_says(self, question: Callable[[], bool]) -> bool:
        """The first process's answer, in all. The others wait here while the first judges, samples or saves."""
        if self.count == 1:
            return question()
        answer = torch.tensor(int(self.is_first and question()))
        distributed.broadcast(answer, 0)
        return bool(answer.item())

    @_among_all
    def add_up(self, parameters: Sequence[Tensor], *numbers: float) -> list[float]:
        """Replaces each gradient by its sum over all processes, and returns such sums of plain numbers.

        One that is missing everywhere stays missing, so that the optimizer passes over the same parameters as in one process.
        """
        if self.count == 1:
            return list(numbers)
        has_gradient = [parameter.grad is not None for parameter in parameters]
        flat = torch.cat([
            *((parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)).float().flatten()
              for parameter in parameters),
            torch.tensor(has_gradient, dtype=torch.float32, device=parameters[0].device),
        ])
        distributed.all_reduce(flat)
        *sums, num_with_gradient = flat.split([*(parameter.numel() for parameter in parameters), len(parameters)])
        for parameter, total, is_there in zip(parameters, sums, num_with_gradient.tolist()):
            parameter.grad = total.view_as(parameter).to(parameter.dtype) if is_there else None
        totals = torch.tensor(numbers, dtype=torch.float64)
        distributed.all_reduce(totals)
        return totals.tolist()

    def require_same(self, facts: dict[str, str]) -> None:
        """RequestError, in all processes, where one of them works on something else."""
        if self.count == 1:
            return
        all_facts = self._gather(facts)
        for name in facts:
            if len({other[name] for other in all_facts}) > 1:
                raise RequestError(f"The {name} is not the same for all processes of this run. Every machine needs the same "
                                   f"run folder (with its checkpoints), pictures, captions and base model (docs/parallel.md).")

    @torch.no_grad()
    def require_same_weights(self, step: int, parameters: Sequence[Tensor]) -> None:
        """CrumbError, in all processes, where the weights have drifted apart; looked at now and then."""
        if self.count == 1 or step % WEIGHTS_COMPARED_EVERY:
            return
        norm = torch.stack([parameter.double().square().sum() for parameter in parameters]).sum().sqrt().item()
        norms = self._gather(norm)
        if max(norms) - min(norms) > MAX_DRIFT * max(norms):
            raise CrumbError(f"The processes' LoRA weights are no longer the same (norms {norms}): an error in crumb or "
                             f"in a GPU. Go back to the last checkpoint by `crumb resume`, or train on one GPU.")

    @_among_all
    def _gather(self, value: object) -> list:
        values = [None] * self.count
        distributed.all_gather_object(values, value)
        return values

    def leave(self) -> None:
        """To be called at the orderly end, by all."""
        if self.count > 1:
            self._gather(None)
            distributed.destroy_process_group()


def join_processes(device: str) -> Processes:
    """Meets the other processes of this run, where a launcher started several. `device` is the plan's."""
    rank, count = launched_as()
    if count == 1:
        return Processes()
    from accelerate import PartialState

    local_rank, local_count = int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", count))
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    if not on_cpu and local_count > torch.cuda.device_count():
        raise RequestError(f"{local_count} processes were started on this machine, but torch sees {torch.cuda.device_count()} "
                           f"GPUs here. Start one for each GPU.")
    # Besides NCCL also gloo, for what the processes tell each other from the CPU: NCCL's waiting would keep the GPU busy.
    state = PartialState(cpu=on_cpu, backend="gloo" if on_cpu else "cuda:nccl,cpu:gloo", timeout=WAIT)
    return Processes(state.process_index, state.num_processes, local_rank, local_count)
