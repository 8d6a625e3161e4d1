"""Which way an operation is computed on a device: by crumb's Triton kernel or by plain torch, and why.

One place decides for all operations. Nothing is asked of a GPU before the first call.
CRUMB_KERNELS=plain takes plain torch everywhere; =triton takes Triton wherever there is a kernel, also on the processor
under TRITON_INTERPRET=1.
"""

import json
import os
import sys
from dataclasses import asdict, dataclass
from functools import lru_cache

import torch

from crumb.kernels.language import triton

AMPERE = (8, 0)
TURING = (7, 5)


@dataclass(frozen=True)
class Operation:
    """What an operation's Triton kernels need."""

    min_capability: tuple[int, int] = TURING
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
    reason: str = ""
    """Why plain torch computes it although Triton could; empty where Triton does."""


OPERATIONS = {
    "geglu": Operation(),
    "layer_norm": Operation(),
    "group_norm_silu": Operation(),
    "lora_linear_int8": Operation(AMPERE, (torch.float16, torch.bfloat16)),
    "int8_transpose": Operation(AMPERE, (torch.int8,)),
    "lora_linear_nf4": Operation(),
    "adamw_8bit": Operation(dtypes=(torch.float32,)),
    "prodigy_8bit": Operation(dtypes=(torch.float32,)),
}


@dataclass(frozen=True)
class Way:
    """The decision for one operation, as `crumb doctor` shows it."""

    triton: bool
    why: str


def uses_triton(operation: str, tensor: torch.Tensor) -> bool:
    """Whether the operation's Triton kernels take this tensor."""
    return way(operation, tensor.device, tensor.dtype).triton


def way(operation: str, device: torch.device, dtype: torch.dtype) -> Way:
    return _way(operation, device, dtype, os.environ.get("CRUMB_KERNELS", "auto"))


@lru_cache(None)
def _way(operation: str, device: torch.device, dtype: torch.dtype, wanted: str) -> Way:
    needs = OPERATIONS[operation]
    if wanted == "plain":
        return Way(False, "CRUMB_KERNELS=plain")
    if triton is None:
        return Way(False, "Triton is not installed")
    if wanted == "triton":
        return Way(True, "CRUMB_KERNELS=triton")
    if device.type != "cuda":
        return Way(False, f"Triton has no kernels for {device.type}")
    capability = torch.cuda.get_device_capability(device)
    if capability < needs.min_capability:
        why = "Triton has no tensor cores before RTX 30" if needs.min_capability == AMPERE else "the card is older than RTX 20"
        return Way(False, f"compute capability {capability[0]}.{capability[1]}: {why}")
    if dtype not in needs.dtypes:
        return Way(False, f"there is no kernel for {str(dtype).removeprefix('torch.')}")
    if needs.reason:
        return Way(False, needs.reason)
    return Way(True, f"compute capability {capability[0]}.{capability[1]}")


def capability_of(device: torch.device) -> tuple[int, int]:
    """Of a GPU; under the interpreter that of Ampere, whose launch configurations fit everywhere since."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else AMPERE


def main() -> int:
    """All decisions for the first GPU, or the processor, as JSON; for `crumb doctor`."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    dtype = torch.bfloat16 if device.type == "cuda" and torch.cuda.get_device_capability() >= AMPERE else torch.float16
    found = {name: asdict(way(name, device, dtype if dtype in needs.dtypes else needs.dtypes[0]))
             for name, needs in OPERATIONS.items()}
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
