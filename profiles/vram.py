"""What a run needs of the GPU's memory, by arithmetic, so that no plan is made that can't fit.

Weights are exact counts; activations come from the counted table of blocks (memory_table.py). What CUDA and its libraries
take for themselves is assumed: those three figures are named below, and the engine tells what it measured beside them.
"""

from dataclasses import dataclass
from functools import lru_cache

from crumb.profiles.fit import Fit
from crumb.profiles.hardware import GIB
from crumb.profiles.memory_table import Span, Table
from crumb.profiles.plan import Plan

CONTEXT_BYTES = int(0.35 * GIB)
"""The CUDA context and loaded kernels. Assumed: 250 to 500 MiB are usual."""
WORKSPACE_BYTES = int(0.12 * GIB)
"""What cuBLAS and cuDNN take to work in. Assumed."""
FRAGMENTATION = 0.03
"""What the allocator can't use, as a share of what is allocated. Assumed."""

WEIGHT_BYTES = {"no": (2.0, 2.0), "int8": (1.004, 1.002), "nf4": (0.516, 1.002)}
"""Bytes of a linear's and of a convolution's weight by the base's format, scales included; all others take 2."""
LARGEST_WEIGHT = 29_491_200
"""Of an up block's convolution; a base in int8 or NF4 has it in 16 bits in one buffer while it is used."""
RING_DEPTH = 3
"""Streamed blocks that are on the GPU at a time."""

TEXT_ENCODER_BYTES = int(1.7 * GIB)
"""Both text encoders in 16 bits (817,720,320 weights) and what they keep of 77 tokens, where they learn."""

PARAMETERS_PER_RANK = {"attention": 1_451_000, "attention+ff": 2_660_000, "attention+ff+conv": 2_660_000}
PARAMETERS_PER_CONV_RANK = 414_000
"""LoRA weights of full-size SDXL for each unit of rank; the counts of the published LoRA formats."""

STATE_BYTES = {"AdamW8bit": 2.05, "AdamW": 8, "Prodigy": 14, "Prodigy8bit": 2.45, "DAdaptAdam": 12, "Adafactor": 0.1, "Lion": 4}
"""Optimizer bytes per trained weight, beside 4 for the weight and 4 for its gradient."""


@dataclass(frozen=True)
class Demand:
    """What of a plan decides how much memory its step takes; ranks are the largest of any block."""

    targets: str
    rank: int
    conv_rank: int
    optimizer: str
    resolution: int
    batch_size: int
    mixed_precision: str = "bf16"
    text_encoders_learn: bool = False

    @classmethod
    def of(cls, plan: Plan) -> "Demand":
        return cls(plan.targets, max(plan.rank, *plan.block_ranks.values(), 1),
                   max(plan.conv_rank, *plan.conv_block_ranks.values(), 0), plan.optimizer, plan.resolution,
                   plan.batch_size, plan.mixed_precision, plan.text_encoders_learn)

    @property
    def scale(self) -> int:
        """What values in 16 bits take so many times of: all counts are for 16 bits, and fp32 takes twice that."""
        return 2 if self.mixed_precision == "no" else 1

    @property
    def num_parameters(self) -> int:
        return PARAMETERS_PER_RANK[self.targets] * self.rank + PARAMETERS_PER_CONV_RANK * self.conv_rank


def peak_bytes(table: Table, demand: Demand, fit: Fit) -> dict[str, int]:
    """The peak of a training step by part; their sum is what the process takes of the card."""
    resident, ring = base_bytes(table, fit, demand.scale)
    parts = {
        "base": resident, "ring of streamed blocks": ring,
        "LoRA, gradients, optimizer": int(demand.num_parameters * (8 + STATE_BYTES[demand.optimizer])),
        "text encoders": TEXT_ENCODER_BYTES * demand.scale if demand.text_encoders_learn else 0,
        "activations": int(activation_bytes(table, demand, fit)),
        "weight buffer": 0 if fit.quantize_base == "no" else 2 * LARGEST_WEIGHT * demand.scale,
    }
    parts["fragmentation"] = int(FRAGMENTATION * sum(parts.values()))
    return parts | {"CUDA and its libraries": CONTEXT_BYTES + WORKSPACE_BYTES}


def base_bytes(table: Table, fit: Fit, scale: int = 1) -> tuple[int, int]:
    """The base's weights that stay on the GPU, and the ring through which the streamed ones come."""
    sizes = {name: block_bytes(table, name, fit.quantize_base, scale) for name in table.weights}
    streamed = [sizes[name] for name in table.blocks if name in fit.streamed]
    ring = min(RING_DEPTH, len(streamed)) * max(streamed, default=0)
    return int(sum(sizes.values()) - sum(streamed)), int(ring)


def block_bytes(table: Table, block: str, quantize_base: str, scale: int = 1) -> float:
    weights, (linear, conv) = table.weights[block], WEIGHT_BYTES[quantize_base]
    in_blocks = weights.linear * linear + weights.conv * conv
    return in_blocks * (scale if quantize_base == "no" else 1) + weights.exact * 2 * scale


def activation_bytes(table: Table, demand: Demand, fit: Fit) -> float:
    """The most that is held at any time of forward and backward, walking along the blocks."""
    held = highest = 0.0
    for span in walk(table, demand, fit):
        highest = max(highest, held + span.most)
        held += span.gained
    return highest * demand.scale


def walk(table: Table, demand: Demand, fit: Fit) -> list[Span]:
    """The spans of a step: from the first block to the last, and back to the first one that has to learn or pass on."""
    spans = spans_of(table, demand, fit.micro_batch)
    names = ["", *table.blocks]
    forward = [spans[fit.mode(name), "forward", name] for name in names]
    backward = [spans[fit.mode(name), "backward", name] for name in reversed(names)
                if (fit.mode(name), "backward", name) in spans]
    return forward + backward


@lru_cache(64)
def spans_of(table: Table, demand: Demand, num_pictures: int) -> dict[tuple[str, str, str], Span]:
    """Every block's spans by (mode, direction, block)."""
    rank = max(demand.rank, demand.conv_rank)
    return {(mode, direction, name): span.at(demand.resolution, num_pictures, rank)
            for (mode, direction), of_blocks in table.spans.items() for name, span in of_blocks.items()}
