"""Chooses how a run lies in memory: the fastest way that fits.

What may be paid with, none of which changes what is learned: blocks computed twice, blocks whose weights come from host
memory, and fewer pictures of a batch at a time. The base's number format is the plan's.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

from crumb.profiles.fit import Fit
from crumb.profiles.gpu_table import Gpu
from crumb.profiles.hardware import GIB
from crumb.profiles.memory_table import Table
from crumb.profiles.speed import Pass, Speed, Work, seconds_per_step
from crumb.profiles.vram import Demand, block_bytes, peak_bytes, spans_of, walk

STREAMED_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)

WORTH_RECOMPUTING = 0.3
"""Share of what a block keeps that computing it twice must save; ResBlocks keep little more than what they read."""

STREAMING_COST = 0.15
"""By how much a step is taken to be slower when all of its base is streamed, beside what it waits for by arithmetic. Assumed:
no transfer hides completely, and it takes memory of the host."""

ROUNDING = {"no": 1.0, "int8": 1.05, "nf4": 1.1}
ROUNDING_ACTIVATIONS = 1.02
"""So many times faster a way has to be that computes with a coarser base or keeps activations in int8: what is exact
is worth a little time."""

MOVED_PER_WEIGHT = 5.0
"""Bytes that a weight in int8 or NF4 moves where it is used: read, written in 16 bits, read again."""


@dataclass(frozen=True)
class Found:
    """A way to lie in memory and what it takes."""

    fit: Fit
    peak_bytes: int
    speed: Speed | None
    """None where nothing is known of the card."""

    streamed_share: float = 0.0

    @property
    def seconds(self) -> float | None:
        """Of a step."""
        return self.speed.seconds * (1 + STREAMING_COST * self.streamed_share) if self.speed else None

    def explain(self) -> str:
        """The arithmetic of the time in one line."""
        streaming = 1 + STREAMING_COST * self.streamed_share
        more = f", x {streaming:.2f} for streaming = {self.seconds:.2f} s" if self.streamed_share else ""
        return self.speed.explain() + more if self.speed else "nothing is known of this card's speed"


@dataclass(frozen=True)
class Machine:
    """What a run has: the card, how much of its memory, how much of the host's for a streamed base.

    `factor` is by how much earlier steps here took longer than by arithmetic, for the base's format.
    """

    gpu: Gpu
    gpu_bytes: float
    host_bytes: float
    factor: float = 1.0


def choose(table: Table, demand: Demand, machine: Callable[[str], Machine], quantize_base: str | None = None,
           int8_activations: bool | None = None, recompute: bool = True) -> Found | None:
    """The fastest way of all formats and kinds of activations, unless they are given; exact ones count as a little faster.

    `machine` by the base's format, since what was measured differs by it. None where nothing fits.
    """
    found = []
    for base in ROUNDING if quantize_base is None else [quantize_base]:
        for in_int8 in (False, True) if int8_activations is None else [int8_activations]:
            if way := fastest_fit(table, demand, machine(base), Fit(base, in_int8), recompute):
                price = ROUNDING[base] * (ROUNDING_ACTIVATIONS if in_int8 else 1)
                found.append(((-way.fit.micro_batch, (way.seconds or 1.0) * price), way))
    return min(found, key=lambda entry: entry[0])[1] if found else None


def fastest_fit(table: Table, demand: Demand, machine: Machine, start: Fit, recompute: bool = True) -> Found | None:
    """The fastest way within the machine's memory, of the base's format and kind of activations of `start`; None: none fits.

    Whole batches go before halves, whatever the time: only where no block helps any more is a batch cut.
    """
    micro_batch = demand.batch_size
    while True:
        found = [way for share in STREAMED_SHARES
                 if (way := _fewest_recomputed(table, demand, machine, replace(
                     start, micro_batch=micro_batch, streamed=_evenly(table, share)), recompute))]
        if found:
            return min(found, key=lambda way: way.seconds or 0.0)
        if micro_batch == 1:
            return None
        micro_batch = (micro_batch + 1) // 2


def smallest_fit(table: Table, demand: Demand, start: Fit, recompute: bool = True, stream: bool = True) -> Fit:
    """The least that a base of this format can take: all blocks twice, all streamed, single pictures."""
    recomputed = frozenset(table.blocks if recompute else ())
    return replace(start, micro_batch=1, recomputed=recomputed, streamed=frozenset(table.blocks) if stream else frozenset())


def measure(table: Table, demand: Demand, machine: Machine, fit: Fit) -> Found:
    """What a way takes, by arithmetic."""
    speed = seconds_per_step(work_of(table, demand, fit), machine.gpu, demand.mixed_precision, fit.quantize_base,
                             machine.factor)
    return Found(fit, total_bytes(table, demand, fit), speed, len(fit.streamed) / len(table.blocks))


def total_bytes(table: Table, demand: Demand, fit: Fit) -> int:
    return sum(peak_bytes(table, demand, fit).values())


def streamed_bytes(table: Table, demand: Demand, fit: Fit) -> float:
    """What lies in host memory instead of on the GPU."""
    return sum(block_bytes(table, name, fit.quantize_base, demand.scale) for name in fit.streamed)


def work_of(table: Table, demand: Demand, fit: Fit) -> Work:
    """The arithmetic of a step of the whole batch, and the bytes that come from host memory in each of its passes."""
    num_passes = -(-demand.batch_size // fit.micro_batch)
    spans, num_forward = walk(table, demand, fit), len(table.weights)
    streamed = streamed_bytes(table, demand, fit)
    moved = 0.0 if fit.quantize_base == "no" else MOVED_PER_WEIGHT * sum(
        weights.conv + (weights.linear if fit.quantize_base == "nf4" else 0) for weights in table.weights.values())

    def one_pass(part: list) -> Pass:
        return Pass(linear_flops=sum(span.flops for span in part),
                    attention_flops=sum(span.attention_flops for span in part), moved_bytes=moved,
                    streamed_bytes=streamed) * num_passes
    return Work(one_pass(spans[:num_forward]), one_pass(spans[num_forward:]))


def explain(table: Table, demand: Demand, machine: Machine, fit: Fit) -> list[str]:
    """What is paid for fitting, in a few lines."""
    found, lines = measure(table, demand, machine, fit), []
    for names, what, plain in ((fit.recomputed, "recomputed", replace(fit, recomputed=frozenset())),
                               (fit.streamed, "streamed from host memory", replace(fit, streamed=frozenset()))):
        if names:
            without = measure(table, demand, machine, plain)
            slower = f"{found.seconds / without.seconds - 1:+.0%} time, " if without.seconds else ""
            saved_gib = (without.peak_bytes - found.peak_bytes) / GIB
            lines.append(f"{len(names)} of {len(table.blocks)} blocks {what}: {slower}-{saved_gib:.1f} GiB")
    if fit.micro_batch < demand.batch_size:
        lines.append(f"{fit.micro_batch} of a batch's {demand.batch_size} pictures at a time")
    return lines or ["nothing: all activations are kept and all of the base stays on the GPU"]


def _fewest_recomputed(table: Table, demand: Demand, machine: Machine, fit: Fit, recompute: bool) -> Found | None:
    """With as few blocks computed twice as memory allows; by halving, since each one more takes less of it."""
    if streamed_bytes(table, demand, fit) > machine.host_bytes:
        return None
    order = recompute_order(table, demand, fit) if recompute else ()

    def with_first(count: int) -> Fit:
        return replace(fit, recomputed=frozenset(order[:count]))

    low, high = 0, len(order)
    if total_bytes(table, demand, with_first(high)) > machine.gpu_bytes:
        return None
    while low < high:
        middle = (low + high) // 2
        if total_bytes(table, demand, with_first(middle)) <= machine.gpu_bytes:
            high = middle
        else:
            low = middle + 1
    return measure(table, demand, machine, with_first(low))


def recompute_order(table: Table, demand: Demand, fit: Fit) -> tuple[str, ...]:
    """Blocks by the bytes that computing them twice saves for each operation more; those that save next to nothing never."""
    return _order(table, demand, replace(fit, recomputed=frozenset()).mode(""), fit.micro_batch or demand.batch_size)


@lru_cache(64)
def _order(table: Table, demand: Demand, mode: str, micro_batch: int) -> tuple[str, ...]:
    spans, worth = spans_of(table, demand, micro_batch), {}
    for name in table.blocks:
        kept, twice = spans[mode, "forward", name], spans["recomputed", "forward", name]
        saved = kept.gained - twice.gained
        if saved > WORTH_RECOMPUTING * kept.gained:
            worth[name] = saved / (twice.flops + twice.attention_flops)
    return tuple(sorted(worth, key=worth.get, reverse=True))


def _evenly(table: Table, share: float) -> frozenset[str]:
    """That share of the blocks, spread over the pass, so that transfers have other blocks' arithmetic to hide behind."""
    return frozenset(name for index, name in enumerate(table.blocks) if int((index + 1) * share) > int(index * share))
