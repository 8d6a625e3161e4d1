"""A step of the optimizers on SDXL's LoRA: 1,444 tensors, 42 million weights at rank 16, fp32 with fp32 gradients."""

from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
from linears import layer_counts
from timing import Arm, Case
from torch import Tensor, nn

from crumb.kernels.adamw_8bit import AdamW8bit
from crumb.kernels.prodigy_8bit import Prodigy8bit

RANK = 16
WARMUPS, RUNS = 6, 30


def lora_shapes(rank: int = RANK) -> list[tuple[int, int]]:
    """Of A and B of every linear in SDXL's transformers."""
    return [shape for (_, inside, out), number in layer_counts().items() for _ in range(number)
            for shape in ((rank, inside), (out, rank))]


def cases(device: torch.device, dtype: torch.dtype, tiny: bool, everything: bool) -> Iterator[Case]:
    shapes = [(4, 40), (24, 4), (4, 300), (90, 4)] if tiny else lora_shapes()
    gradients = cache(partial(_gradients, shapes, device))
    yield Case("optimizer", f"SDXL's LoRA, rank {RANK}",
               {name: partial(_arm, make, shapes, device, gradients) for name, make in OPTIMIZERS.items()},
               warmups=2 if tiny else WARMUPS, runs=2 if tiny else RUNS, counts_launches=True)


def _gradients(shapes: list[tuple[int, int]], device: torch.device) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(2)
    return [torch.randn(shape, generator=generator, device=device) * 1e-3 for shape in shapes]


def _arm(make: Callable, shapes: list[tuple[int, int]], device: torch.device, gradients: Callable[[], list[Tensor]]) -> Arm:
    generator = torch.Generator(device).manual_seed(1)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator, device=device) * 0.02) for shape in shapes]
    before = [parameter.detach().clone() for parameter in parameters[:2]]
    optimizer = make(parameters)
    for parameter, gradient in zip(parameters, gradients()):
        parameter.grad = gradient
    for _ in range(3):  # 8-bit states begin as zeros, and Prodigy's d small
        optimizer.step()
    if all(torch.equal(old, new) for old, new in zip(before, parameters)):
        raise AssertionError("three steps left the weights where they were")
    if not all(bool(parameter.isfinite().all()) for parameter in parameters):
        raise AssertionError("a weight is not finite")
    return Arm({"step": optimizer.step}, facts={
        "state_bytes": _state_bytes(optimizer), "tensors": len(shapes),
        "parameters": sum(parameter.numel() for parameter in parameters)})


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """All tensors kept beside weights and gradients; tables that tensors share count once."""
    if isinstance(optimizer, AdamW8bit | Prodigy8bit):
        return optimizer.num_state_bytes
    kept: dict[int, Tensor] = {}
    for state in optimizer.state.values():
        kept |= {value.data_ptr(): value for value in state.values() if isinstance(value, Tensor)}
    return sum(value.nbytes for value in kept.values())


def _bitsandbytes(parameters):
    import bitsandbytes as bnb

    return bnb.optim.AdamW8bit(parameters, lr=1e-4)


def _prodigyopt(parameters, **settings):
    from prodigyopt import Prodigy

    return Prodigy(parameters, **settings)


OPTIMIZERS: dict[str, Callable] = {
    "torch AdamW, fused": partial(torch.optim.AdamW, lr=1e-4, fused=True),
    "bitsandbytes AdamW8bit": _bitsandbytes,
    "crumb AdamW8bit": partial(AdamW8bit, lr=1e-4),
    "crumb AdamW, 32 bits": partial(AdamW8bit, lr=1e-4, bits=32),
    "prodigyopt Prodigy": _prodigyopt,
    "prodigyopt Prodigy, slice_p=11": partial(_prodigyopt, slice_p=11),
    "crumb Prodigy8bit": Prodigy8bit,
    "crumb Prodigy, 32 bits": partial(Prodigy8bit, bits=32),
}
