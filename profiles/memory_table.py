"""What each block of a U-Net holds in memory and computes in a training step, as counted by engine/memory/count.py.

A step is cut into spans where blocks begin, forward and then backward in reverse; each span says how many bytes it adds to
what is held and how far above its start it gets. Walking along the spans gives the peak of any mixture of blocks that keep
their activations and blocks that compute them twice.
"""

import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.resources import files

MODES = ("kept", "kept in int8", "recomputed")
Spans = dict[str, "SpanFit"]


@dataclass(frozen=True)
class Span:
    """A stretch of a step: bytes gained by its end, the most above its start, floating-point operations."""

    gained: float
    most: float
    flops: float
    attention_flops: float


@dataclass(frozen=True)
class SpanFit:
    """How a span grows: each of `gained`, `most` and `flops` is c[0] + c[1] m + c[2] r + c[3] m r for m megapixels of all
    pictures (1024x1024 is 1) and rank r. Attention's part goes with the number of pixels squared."""

    gained: tuple[float, ...]
    most: tuple[float, ...]
    flops: tuple[float, ...]
    attention_flops: float

    def at(self, resolution: int, num_pictures: int, rank: int) -> Span:
        area = (resolution / 1024) ** 2
        megapixels = num_pictures * area
        gained, most, flops = (fit[0] + fit[1] * megapixels + fit[2] * rank + fit[3] * megapixels * rank
                               for fit in (self.gained, self.most, self.flops))
        return Span(gained, most, flops, self.attention_flops * megapixels * area)


@dataclass(frozen=True)
class Weights:
    """How many weights a block has: of its linears, of its convolutions, and of what stays in 16 bits always."""

    linear: int
    conv: int
    exact: int


@dataclass(frozen=True, eq=False)
class Table:
    """`weights` in the order of a forward pass; "" is outside the blocks. `spans` by (mode, direction), then block."""

    weights: dict[str, Weights]
    spans: dict[tuple[str, str], Spans]

    @property
    def blocks(self) -> list[str]:
        return [name for name in self.weights if name]


def fit_span(shapes: list[tuple[int, int]], counted: list[Span]) -> SpanFit:
    """The fit through one or four counts of single pictures, at `shapes` (resolution, rank): two sizes by two ranks."""
    def fit(name: str) -> tuple[float, ...]:
        values = [getattr(span, name) for span in counted]
        if len(shapes) == 1:
            return (values[0], 0.0, 0.0, 0.0)
        (small, low), (large, _), (_, high) = shapes[0], shapes[1], shapes[2]
        small_area, large_area = (small / 1024) ** 2, (large / 1024) ** 2
        slopes = [(values[i + 1] - values[i]) / (large_area - small_area) for i in (0, 2)]
        starts = [values[i] - slope * small_area for i, slope in zip((0, 2), slopes)]
        by_rank, start_by_rank = ((pair[1] - pair[0]) / (high - low) for pair in (slopes, starts))
        return (starts[0] - start_by_rank * low, slopes[0] - by_rank * low, start_by_rank, by_rank)
    largest, resolution = counted[-1], shapes[-1][0]
    return SpanFit(fit("gained"), fit("most"), fit("flops"), largest.attention_flops / (resolution / 1024) ** 4)


def dump_tables(tables: dict[str, Table], versions: dict[str, str]) -> str:
    """Tables by the plan's `targets`, as JSON; equal rows are written once."""
    rows: dict[str, int] = {}

    def row(span: SpanFit) -> int:
        numbers = [*(round(number) for fit in (span.gained, span.most, span.flops) for number in fit),
                   round(span.attention_flops)]
        return rows.setdefault(json.dumps(numbers), len(rows))

    spans = {targets: {f"{mode}, {direction}": {name: row(span) for name, span in of_blocks.items()}
                       for (mode, direction), of_blocks in table.spans.items()} for targets, table in tables.items()}
    weights = {name: list(asdict(of_block).values()) for name, of_block in next(iter(tables.values())).weights.items()}
    parts = [f'"versions": {json.dumps(versions)}', f'"weights": {_one_per_line(weights)}',
             '"rows": [\n' + ",\n".join(rows) + "\n]",
             '"spans": {\n' + ",\n".join(f"{json.dumps(targets)}: {_one_per_line(of_modes)}"
                                         for targets, of_modes in spans.items()) + "\n}"]
    return "{\n" + ",\n".join(parts) + "\n}\n"


@lru_cache
def load_table(targets: str) -> Table:
    """SDXL's own U-Net with the plan's `targets` learning."""
    content = json.loads(files("crumb.profiles").joinpath("sdxl_memory.json").read_text())
    rows = [SpanFit(tuple(row[0:4]), tuple(row[4:8]), tuple(row[8:12]), row[12]) for row in content["rows"]]
    spans = {tuple(key.split(", ")): {name: rows[index] for name, index in of_blocks.items()}
             for key, of_blocks in content["spans"][targets].items()}
    return Table({name: Weights(*numbers) for name, numbers in content["weights"].items()}, spans)


def _one_per_line(content: dict) -> str:
    return "{\n" + ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in content.items()) + "\n}"
