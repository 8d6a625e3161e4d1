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
    "geglu": {75: Launch({"BLOCK": 512}, num_warps=2)},
    "geglu int8": {75: Launch({"BLOCK": 512}, num_warps=2)},
    "layer_norm": {75: Launch({"TILE": 4096}, num_warps=4)},
    "group_norm_silu sums channels_last": {75: Launch({"BLOCK_C": 64, "BLOCK_P": 128}, num_warps=8)},
    "group_norm_silu sums contiguous": {75: Launch({"BLOCK_C": 16, "BLOCK_P": 256}, num_warps=4)},
    "group_norm_silu merge": {75: Launch({"BLOCK": 1024}, num_warps=4)},
    "group_norm_silu apply channels_last": {75: Launch({"BLOCK_C": 64, "BLOCK_P": 64}, num_warps=8)},
    "group_norm_silu apply contiguous": {75: Launch({"BLOCK_C": 8, "BLOCK_P": 256}, num_warps=4)},
    "int8_quantise": {80: Launch({"BLOCK_M": 16}, 4, 3)},
    "int8_quantise_high_rank": {80: Launch({"BLOCK_M": 32}, 8, 2)},
    "int8_multiply": {80: Launch({"BLOCK_M": 128, "BLOCK_N": 128, "BAND": 8}, 8, 3),
                      90: Launch({"BLOCK_M": 128, "BLOCK_N": 128, "BAND": 8}, 8, 4),
                      120: Launch({"BLOCK_M": 128, "BLOCK_N": 128, "BAND": 8}, 8, 3)},
    "int8_multiply_small": {80: Launch({"BLOCK_M": 64, "BLOCK_N": 64, "BAND": 8}, 4, 3)},
    "int8_transpose": {80: Launch({"BLOCK": 64}, 4)},
    "nf4_dequantise": {75: Launch({"BLOCK": 1024}, 4)},
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


@lru_cache(None)
def num_processors(device: torch.device) -> int:
    """How many blocks a GPU works on at once, at least; 1 under the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
