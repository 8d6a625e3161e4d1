"""Fits a run into this machine's memory: solved from the counted table, remembered in the run's folder once it changed."""

import json
import logging
from dataclasses import asdict, replace
from functools import lru_cache

import torch

from crumb.engine.memory.count import block_names, count_table
from crumb.engine.memory.ladder import COARSER, next_rung
from crumb.engine.memory.placement import Placement
from crumb.engine.model.load import unet_config_of
from crumb.engine.run.directory import RunDirectory, write_atomic
from crumb.engine.run.events import EventWriter
from crumb.profiles.base_model import BaseModel
from crumb.profiles.errors import CrumbError
from crumb.profiles.fit import Fit
from crumb.profiles.hardware import GIB, host_memory_bytes, resolve_gpu
from crumb.profiles.measured import time_factor
from crumb.profiles.memory_rules import ASSUMED_HOST_GIB, HOST_SPARE_GIB
from crumb.profiles.memory_table import Table, load_table
from crumb.profiles.plan import Plan
from crumb.profiles.solver import Machine, explain, fastest_fit, recompute_order, smallest_fit, streamed_bytes, total_bytes
from crumb.profiles.vram import CONTEXT_BYTES, Demand

log = logging.getLogger("crumb")

SDXL_PARAMETERS = 2_567_463_684
PHASES = {"load": "while loading", "fit": "in the fit check", "train": "in training", "judge": "while measuring"}
SPARE_BYTES = int(0.15 * GIB)
"""Left to the desktop and to whoever else may want some while the run goes on."""


def fit_into_memory(placement: Placement, plan: Plan, base: BaseModel, run: RunDirectory) -> tuple[Placement, list[str]]:
    """The placement with the fastest way that fits what is free now, and what that costs in a few lines.

    A run that had to give something up before goes on as it then did. On a processor there is nothing to fit into: the
    plan's own words are taken. On a GPU the allocator is capped, so that what does not fit is an error and never spills
    into the host's memory.
    """
    if remembered := load_fit(run):
        return replace(placement, fit=remembered), ["as this run had to do before"]
    if placement.device.type != "cuda":
        recomputed = frozenset(block_names(unet_config_of(base))) if plan.gradient_checkpointing else frozenset()
        return replace(placement, fit=replace(placement.fit, recomputed=recomputed)), []
    table, demand, machine = table_for(base, plan), Demand.of(plan), this_machine(plan)
    _cap_allocator(machine.gpu_bytes)
    start, lines = placement.fit, []
    while not (found := fastest_fit(table, demand, machine, start, plan.gradient_checkpointing)):
        if start.quantize_base not in COARSER:
            fit = smallest_fit(table, demand, start, stream=False)
            return replace(placement, fit=fit), [
                f"by arithmetic this takes {total_bytes(table, demand, fit) / GIB:.1f} GiB, and "
                f"{machine.gpu_bytes / GIB:.1f} are free: it is tried nevertheless"]
        start = replace(start, quantize_base=COARSER[start.quantize_base])
        lines = [f"the base is kept in {start.quantize_base}: the plan's {plan.quantize_base!r} does not fit into what is free"]
    return replace(placement, fit=found.fit), lines + explain(table, demand, machine, found.fit)


def this_machine(plan: Plan) -> Machine:
    """The GPU and what of it this run may take in all, its own context included."""
    free, _ = torch.cuda.mem_get_info()
    budget = free + torch.cuda.memory_reserved() + CONTEXT_BYTES - SPARE_BYTES
    if plan.vram_gib:
        budget = min(budget, int(plan.vram_gib * GIB))
    gpu = resolve_gpu("auto")
    host_bytes = max(0, (host_memory_bytes() or ASSUMED_HOST_GIB * GIB) - HOST_SPARE_GIB * GIB)
    return Machine(gpu, budget, host_bytes, time_factor(gpu.name, plan.quantize_base))


def one_rung_down(placement: Placement, plan: Plan, base: BaseModel, run: RunDirectory, reason: str, phase: str, step: int,
                  events: EventWriter) -> tuple[Placement, list[str]]:
    """What to go on with after memory ran out in `phase` beyond step `step`; kept in the run's folder.

    CrumbError that says what would fit where nothing is left to give up.
    """
    table, demand, fit = table_for(base, plan), Demand.of(plan), placement.fit
    order = recompute_order(table, demand, fit)
    blocks = [*order, *(name for name in table.blocks if name not in order)]
    more = streamed_bytes(table, demand, replace(fit, streamed=frozenset(blocks))) - streamed_bytes(table, demand, fit)
    available = host_memory_bytes()
    rung = next_rung(fit, blocks, may_stream=available is None or more + HOST_SPARE_GIB * GIB < available)
    if rung is None:
        raise CrumbError(f"Out of memory, and nothing is left to give up ({reason}). "
                         f"{_what_would_fit(table, demand, fit, plan)} "
                         f"Or close what else uses this GPU, then `crumb resume {run.name}`.")
    save_fit(run, rung[0])
    events.emit("warning", text=f"The memory ran out ({PHASES.get(phase, phase)}, after step {step}). The run goes on from "
                                f"there with less: {rung[1]}.")
    return replace(placement, fit=rung[0]), [rung[1]]


def _what_would_fit(table: Table, demand: Demand, fit: Fit, plan: Plan) -> str:
    """Numbers of a plan that takes less, in a sentence."""
    smaller = {f"resolution = {plan.resolution // 128 * 64}": replace(demand, resolution=plan.resolution // 128 * 64),
               f"rank = {max(1, plan.rank // 2)}": replace(demand, rank=max(1, demand.rank // 2))}
    needs = " and ".join(f"{total_bytes(table, other, fit) / GIB:.1f} GiB with {name}" for name, other in smaller.items())
    return f"By arithmetic this run needs {total_bytes(table, demand, fit) / GIB:.1f} GiB, {needs}: start a new run with those."


def predicted_bytes(placement: Placement, plan: Plan, base: BaseModel) -> int:
    """The most that torch takes of the GPU, by arithmetic; the CUDA context comes on top."""
    return total_bytes(table_for(base, plan), Demand.of(plan), placement.fit) - CONTEXT_BYTES


def table_for(base: BaseModel, plan: Plan) -> Table:
    """The counted table of SDXL's own U-Net; of any other U-Net it is counted now, for this very plan, in seconds."""
    if base.num_unet_parameters == SDXL_PARAMETERS:
        return load_table(plan.targets)
    return _counted(base, plan.targets, plan.rank, plan.conv_rank, plan.resolution)


@lru_cache(1)
def _counted(base: BaseModel, targets: str, rank: int, conv_rank: int, resolution: int) -> Table:
    log.info("counting what the blocks of this base take")
    return count_table(unet_config_of(base), targets, [(resolution, max(rank, conv_rank))])


def _cap_allocator(budget_bytes: float) -> None:
    """Makes torch refuse what would go beyond, rather than let the driver move it into the host's memory."""
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, (budget_bytes - CONTEXT_BYTES) / total)))


def save_fit(run: RunDirectory, fit: Fit) -> None:
    content = {name: sorted(value) if isinstance(value, frozenset) else value for name, value in asdict(fit).items()}
    write_atomic(run.fit, json.dumps(content, indent=1).encode())


def load_fit(run: RunDirectory) -> Fit | None:
    try:
        content = json.loads(run.fit.read_bytes())
        return Fit(**{name: frozenset(value) if isinstance(value, list) else value for name, value in content.items()})
    except (OSError, ValueError, TypeError):
        return None
