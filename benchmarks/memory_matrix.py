"""What crumb would do on the usual cards, by arithmetic alone: writes docs/memory-matrix.md (seconds, no GPU).

    python -P benchmarks/memory_matrix.py
"""

import sys
from pathlib import Path

from crumb.profiles.fit import Fit
from crumb.profiles.hardware import GIB, resolve_gpu
from crumb.profiles.memory_rules import ASSUMED_HOST_GIB, HOST_SPARE_GIB, budget_bytes
from crumb.profiles.memory_table import load_table
from crumb.profiles.plan import TARGETS
from crumb.profiles.solver import Machine, choose
from crumb.profiles.vram import Demand

CARDS = {4: "GTX 1650", 6: "RTX 2060 6GB", 8: "RTX 4060", 10: "RTX 3080 10GB", 12: "RTX 3060 12GB", 16: "RTX 4060 Ti 16GB",
         24: "RTX 3090"}
RANKS = (8, 16, 32, 64, 128)
OPTIMIZERS = ("AdamW8bit", "Prodigy8bit", "AdamW", "Prodigy")
RESOLUTIONS = (1024, 768, 512)
OUT = Path(__file__).parents[1] / "docs" / "memory-matrix.md"

HEAD = """# What fits where, by arithmetic

Written by `python -P benchmarks/memory_matrix.py`; **none of it is measured on a GPU**. One picture at a time, the base free
to be exact, int8 or NF4. Each cell: predicted peak in GiB (CUDA context included), the base's format (16, i8, n4; * =
the largest activations in int8), r = blocks of 87 recomputed, s = blocks of 87 streamed from host memory, seconds a step.
"""


def main() -> int:
    parts = [HEAD, "Cards: " + ", ".join(f"{size} GB {name}" for size, name in CARDS.items()) + ".\n"]
    for targets in TARGETS:
        for optimizer in OPTIMIZERS:
            for resolution in RESOLUTIONS:
                parts.append(f"\n## {targets}, {optimizer}, {resolution}x{resolution}\n\n"
                             f"| card | {' | '.join(f'rank {rank}' for rank in RANKS)} |\n|{'---|' * (len(RANKS) + 1)}\n")
                parts += [_row(size, name, targets, optimizer, resolution) for size, name in CARDS.items()]
    OUT.write_text("".join(parts))
    return 0


def _row(size: int, name: str, targets: str, optimizer: str, resolution: int) -> str:
    gpu = resolve_gpu(name)
    precision = "bf16" if gpu.has_bf16 else "fp16"
    machine = Machine(gpu, budget_bytes(gpu), (ASSUMED_HOST_GIB - HOST_SPARE_GIB) * GIB)
    cells = []
    for rank in RANKS:
        demand = Demand(targets, rank, rank // 2 if "conv" in targets else 0, optimizer, resolution, 1, precision)
        found = choose(load_table(targets), demand, lambda _: machine)
        cells.append(f"{found.peak_bytes / GIB:.1f} {_short(found.fit)} {found.seconds:.2f} s" if found else "-")
    return f"| {size} GB | {' | '.join(cells)} |\n"


def _short(fit: Fit) -> str:
    base = {"no": "16", "int8": "i8", "nf4": "n4"}[fit.quantize_base] + ("*" if fit.int8_activations else "")
    return " ".join([base, *([f"r{len(fit.recomputed)}"] if fit.recomputed else []),
                     *([f"s{len(fit.streamed)}"] if fit.streamed else [])])


if __name__ == "__main__":
    sys.exit(main())
