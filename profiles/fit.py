"""How a run lies in the GPU's memory; placements.py chooses it, the engine carries it out."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Fit:
    """How a run lies in memory: the base's format, which blocks compute their activations twice, which blocks' weights
    come from host memory whenever they are needed, and how many pictures of a batch go through at a time."""

    quantize_base: str = "no"
    int8_activations: bool = False
    recomputed: frozenset[str] = field(default_factory=frozenset)
    streamed: frozenset[str] = field(default_factory=frozenset)
    micro_batch: int = 0
    """0 is all."""

    def mode(self, block: str) -> str:
        return "recomputed" if block in self.recomputed else "kept in int8" if self.int8_activations else "kept"
