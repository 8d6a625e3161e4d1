"""Launch configurations of all Triton kernels, by kernel and architecture. Nothing is tuned at start-up.

Limits: 64 KB of shared memory on sm_75, 99 KB on sm_86, sm_89 and sm_120; no spilled registers anywhere.
tests/kernels/test_compile.py compiles every entry for every architecture and holds it to them.
"""

from dataclasses import dataclass, field
from functools import lru_cache

import torch

from crumb.kernels.dispatch import capability_of


@dataclass(frozen=True)
class Launch:
    """`blocks`: tile sizes by the kernel's own names."""

    blocks: dict[str, int] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2

    def options(self) -> dict[str, int]:
        """As keyword arguments of a launch."""
        return {**self.blocks, "num_warps": self.num_warps, "num_stages": self.num_stages}


CONFIGS: dict[str, dict[int, Launch]] = {
    # Two blocks of 256 for 128 threads: four neighbours a thread, which is one load of 16 bytes and no change of layout.
    "adamw_8bit": {75: Launch({"BLOCKS": 2})},
    "prodigy_8bit_moments": {75: Launch({"BLOCKS": 2})},
    "prodigy_8bit_apply": {75: Launch({"BLOCKS": 2})},
}
"""By kernel, then by the first architecture (75, 80, 86, 89, 90, 120) that an entry is for."""


def launch_for(kernel: str, capability: tuple[int, int]) -> Launch:
    """The newest entry that is not newer than the card."""
    number = capability[0] * 10 + capability[1]
    return CONFIGS[kernel][max(first for first in CONFIGS[kernel] if first <= number)]


@lru_cache(None)
def launch_on(kernel: str, device: torch.device) -> Launch:
    return launch_for(kernel, capability_of(device))
