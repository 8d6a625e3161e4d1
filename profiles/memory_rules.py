"""How a run fits a card's memory: the base's format, what is kept until backward, pictures at a time."""

from dataclasses import replace
from functools import partial

from crumb.profiles.base_model import BaseModel
from crumb.profiles.derivation import Derivation
from crumb.profiles.fit import Fit
from crumb.profiles.gpu_table import Gpu
from crumb.profiles.hardware import GIB, host_memory_bytes
from crumb.profiles.measured import time_factor
from crumb.profiles.memory_table import load_table
from crumb.profiles.solver import Machine, choose, explain, fastest_fit, measure, smallest_fit, total_bytes
from crumb.profiles.vram import Demand, peak_bytes

FULL_MODEL_PARAMETERS = 1_000_000_000
SMALL_BASE_BATCH = 4

DESKTOP_GIB = 0.3
"""What others than crumb take of a card, at least."""

ASSUMED_HOST_GIB = 10
"""Free memory of a machine that is not this one."""
HOST_SPARE_GIB = 3
"""What the engine itself and others on the host want besides."""



def derive_memory(result: Derivation, base: BaseModel, gpu: Gpu) -> None:
    result.put("vram_gib", gpu.vram_gib, "", f"{gpu.name}, {gpu.vram_gib:g} GiB" if gpu.vram_gib else "no GPU")
    result.put("device", "cuda" if gpu.vram_gib else "cpu", "", gpu.name)
    result.put("cache_latents", True, "COMMON", "each picture is encoded once; the VAE then leaves memory")
    full = base.num_unet_parameters > FULL_MODEL_PARAMETERS
    result.put("vae_tiling", full and gpu.vram_gib < 12, "COMMON", "below 12 GiB the VAE works in tiles of 512 pixels"
               if full and gpu.vram_gib < 12 else "the VAE takes whole pictures")
    if full and gpu.vram_gib:
        _derive_fit(result, gpu)
        return
    result.put("quantize_base", "no", "COMMON", "the base stays as it is")
    result.put("gradient_checkpointing", full, "COMMON", "a full-size SDXL would keep gigabytes of activations: they are "
               "computed twice" if full else "this base is small: its activations fit, nothing is computed twice")
    result.put("int8_activations", False, "COMMON", "activations are kept as they are")
    result.put("batch_size", 1 if full else SMALL_BASE_BATCH, "COMMON", "one picture at a time" if full
               else "this base is small: four at a time learn the same in a quarter of the steps")


def _derive_fit(result: Derivation, gpu: Gpu) -> None:
    """The way of least time, by the solver that the engine asks again with what is free when the run starts."""
    demand = demand_of(result, result.overrides.get("batch_size", 1))
    table, overrides = load_table(demand.targets), result.overrides
    found = choose(table, demand, partial(machine_for, gpu), overrides.get("quantize_base"), overrides.get("int8_activations"),
                   overrides.get("gradient_checkpointing", True))
    if found is None:
        found = measure(table, demand, machine_for(gpu, "nf4"),
                        _smallest(result, demand, overrides.get("quantize_base", "nf4")))
    fit, demand = _enlarge_batch(result, gpu, demand, found.fit)
    found = measure(table, demand, machine_for(gpu, fit.quantize_base), fit)
    peak_gib, costs = found.peak_bytes / GIB, "; ".join(explain(table, demand, machine_for(gpu, fit.quantize_base), fit))
    result.put("quantize_base", fit.quantize_base, "COMMON", _reason_for_format(result, gpu, demand, fit))
    result.put("gradient_checkpointing", True, "COMMON", f"allowed, as far as memory asks for it. Here: {costs}")
    result.put("int8_activations", fit.int8_activations, "COMMON", "the largest activations are kept in int8, which spares "
               "computing them twice" if fit.int8_activations else "activations are kept as they are")
    result.put("batch_size", demand.batch_size, "COMMON", f"about {peak_gib:.1f} GiB in all")
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in peak_bytes(table, demand, fit).items() if size > 0.05 * GIB)
    result.put("peak_gib", round(peak_gib, 2), "", f"GiB by arithmetic: {parts}")
    if found.speed:
        result.put("seconds_per_step", round(found.seconds, 2), "", found.explain())


def _enlarge_batch(result: Derivation, gpu: Gpu, demand: Demand, fit: Fit) -> tuple[Fit, Demand]:
    """Up to four pictures at a time from 16 GiB on, where nothing needs be computed twice or streamed for that."""
    if gpu.vram_gib < 16 or "batch_size" in result.overrides or fit.recomputed or fit.streamed:
        return fit, demand
    for size in (4, 2):
        larger, larger_fit = replace(demand, batch_size=size), replace(fit, micro_batch=size)
        if total_bytes(load_table(demand.targets), larger, larger_fit) <= budget_bytes(gpu):
            return larger_fit, larger
    return fit, demand


def _reason_for_format(result: Derivation, gpu: Gpu, demand: Demand, fit: Fit) -> str:
    if fit.quantize_base == "no":
        return "the base stays exact" + ("" if not fit.streamed else
                                         f": {len(fit.streamed)} of its blocks come from host memory when they are needed")
    table, machine = load_table(demand.targets), machine_for(gpu, "no")
    exact = fastest_fit(table, demand, machine, Fit("no", fit.int8_activations))
    if exact is None or exact.seconds is None:
        return f"an exact base does not fit; in {fit.quantize_base} it does"
    mine = measure(table, demand, machine_for(gpu, fit.quantize_base), fit)
    return f"{mine.seconds:.2f} s a step; an exact base would take {exact.seconds:.2f} s, most of it fetched from host memory"


def machine_for(gpu: Gpu, quantize_base: str) -> Machine:
    """The card as a plan takes it. Only where the card is in this machine is it known what memory the host has."""
    here = gpu.free_gib is not None
    host_bytes = (host_memory_bytes() if here else None) or ASSUMED_HOST_GIB * GIB
    return Machine(gpu, budget_bytes(gpu), max(0, host_bytes - HOST_SPARE_GIB * GIB), time_factor(gpu.name, quantize_base))


def budget_bytes(gpu: Gpu) -> float:
    return (gpu.vram_gib - DESKTOP_GIB) * GIB


def demand_of(result: Derivation, batch_size: int, rank: int | None = None) -> Demand:
    """With all that is decided so far; `rank` is tried before it is."""
    overrides = result.overrides
    targets, conv_rank = (result.values[name].value if name in result.values else overrides.get(name, default)
                          for name, default in (("targets", "attention+ff"), ("conv_rank", 0)))
    return Demand(targets, max(rank or result.value("rank"), *overrides.get("block_ranks", {}).values(), 1),
                  max(conv_rank, *overrides.get("conv_block_ranks", {}).values(), 0), result.value("optimizer"),
                  result.value("resolution"), batch_size, result.value("mixed_precision"), text_encoders_learn(result))


def rank_fits(result: Derivation, gpu: Gpu, rank: int, lowest: int) -> bool:
    """Whether the card holds this rank beside the whole base; an exact one, where it holds that with the `lowest` rank."""
    def fits(rank: int, quantize_base: str) -> bool:
        demand = demand_of(result, 1, rank)
        fit = _smallest(result, demand, result.overrides.get("quantize_base", quantize_base), stream=False)
        return total_bytes(load_table(demand.targets), demand, fit) <= budget_bytes(gpu)
    return fits(rank, "no" if fits(lowest, "no") else "nf4")


def _smallest(result: Derivation, demand: Demand, quantize_base: str, stream: bool = True) -> Fit:
    start = Fit(quantize_base, result.overrides.get("int8_activations", False))
    return smallest_fit(load_table(demand.targets), demand, start, result.overrides.get("gradient_checkpointing", True), stream)


def text_encoders_learn(result: Derivation) -> bool:
    return max(result.overrides.get(name, 0) for name in ("text_encoder_learning_rate", "text_encoder_2_learning_rate")) > 0


def warn_of_memory(result: Derivation, base: BaseModel, gpu: Gpu) -> None:
    if base.num_unet_parameters <= FULL_MODEL_PARAMETERS or not gpu.vram_gib:
        return
    needed_gib = result.value("peak_gib")
    if needed_gib * GIB > budget_bytes(gpu):
        how = "16 bits" if result.value("quantize_base") == "no" else result.value("quantize_base")
        result.warn("COMMON", f"This run needs about {needed_gib:.1f} GiB of VRAM, its base in {how}, and the card has "
                              f"{gpu.vram_gib:g} GiB: it will most likely stop with an out-of-memory error.")
    elif gpu.free_gib is not None and gpu.free_gib < needed_gib:
        result.warn("COMMON", f"Only {gpu.free_gib:.1f} GiB of the card are free now, and the fastest way takes "
                              f"{needed_gib:.1f}: close what else uses the GPU, or the run will take a slower way that fits.")
