"""Which attention computes: torch's own, or xformers' where it is installed and measured faster on this GPU.

    softmax(q kᵀ / √head width) v       all (B, tokens, heads · head width)

Neither ever holds the scores: torch's math attention, which does (10 × 4096² of them at 1024x1024), is switched off on GPUs.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Attend = Callable[[Tensor, Tensor, Tensor, int], Tensor]

WORTH_IT = 0.97
"""xformers is taken from 3 % less time on: below that a second measurement may choose otherwise."""
WARM_UP, REPEATS = 2, 5
REFUSALS = {
    "is non-deterministic": "xformers has no repeatable backward for this card",
    "wasn't built": "xformers was built for another torch or has no kernels for this card",
}
"""What xformers says somewhere in its long error where no kernel of it takes the call, and what it comes to."""


@dataclass(frozen=True)
class Shape:
    """Of one attention; `num_keys` is `num_tokens` where tokens look at each other."""

    batch_size: int
    num_tokens: int
    num_keys: int
    num_heads: int
    head_width: int = 64


SDXL_SHAPES = {Shape(1, 4096, 4096, 10): 10, Shape(1, 4096, 77, 10): 10, Shape(1, 1024, 1024, 20): 60,
               Shape(1, 1024, 77, 20): 60}
"""At 1024x1024, each with how many blocks have it."""


@dataclass(frozen=True)
class Attention:
    """The choice; `reason` is for people."""

    name: str
    attend: Attend
    reason: str


def attend(query: Tensor, key: Tensor, value: Tensor, num_heads: int) -> Tensor:
    """Torch's own, flash or memory-efficient by its own choice; heads are views."""
    query, key, value = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def choose_attention(device: torch.device, dtype: torch.dtype, shapes: dict[Shape, int]) -> Attention:
    """What takes less time for all `shapes`, each so many times. Call it after all settings of torch are made: xformers
    refuses some of its kernels under torch.use_deterministic_algorithms. Switches math attention off on GPUs for good."""
    if device.type != "cuda":
        return Attention("torch", attend, f"torch's own on {device.type}")
    torch.backends.cuda.enable_math_sdp(False)
    theirs, problem = load_xformers()
    return compare(theirs, device, dtype, shapes) if theirs else Attention("torch", attend, problem)


def load_xformers() -> tuple[Attend | None, str]:
    """Its attention, or none and why not."""
    if "xformers" in sys.modules and sys.modules["xformers"] is None:
        return None, "xformers is installed but broken: torch's own"
    try:
        from xformers.ops import memory_efficient_attention
    except ModuleNotFoundError as error:
        if error.name == "xformers":
            return None, "xformers is not installed: torch's own"
        return None, f"xformers is installed but broken ({error}): torch's own"
    except Exception as error:  # a wheel for another torch raises anything
        return None, f"xformers is installed but broken ({type(error).__name__}: {error}): torch's own"

    def attend_by_xformers(query: Tensor, key: Tensor, value: Tensor, num_heads: int) -> Tensor:
        return memory_efficient_attention(*(t.unflatten(-1, (num_heads, -1)) for t in (query, key, value))).flatten(2)
    return attend_by_xformers, ""


def compare(theirs: Attend, device: torch.device, dtype: torch.dtype, shapes: dict[Shape, int]) -> Attention:
    """xformers' where it computes the same in less time, forward and backward, else torch's own."""
    ours_ms = theirs_ms = 0.0
    for shape, count in shapes.items():
        given = _random_arguments(shape, device, dtype)
        expected = _pass(attend, given, shape.num_heads)
        try:
            found = _pass(theirs, given, shape.num_heads)
            if not all(_agree(one, other) for one, other in zip(found, expected)):
                return Attention("torch", attend, "xformers computes something else here: torch's own")
            theirs_ms += count * _milliseconds(theirs, given, shape.num_heads)
        except Exception as error:  # no kernel for this card, no memory, a launch that fails
            return Attention("torch", attend, f"{_refusal(error)}: torch's own")
        ours_ms += count * _milliseconds(attend, given, shape.num_heads)
    times = f"{theirs_ms:.1f} ms a step, torch's own {ours_ms:.1f}"
    if theirs_ms < WORTH_IT * ours_ms:
        return Attention("xformers", theirs, f"xformers: {times}")
    return Attention("torch", attend, f"xformers takes {times}: torch's own")


def _random_arguments(shape: Shape, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and the result's gradient; no generator that training draws from moves."""
    generator = torch.Generator(device).manual_seed(0)
    width = shape.num_heads * shape.head_width
    counts = shape.num_tokens, shape.num_keys, shape.num_keys, shape.num_tokens
    tensors = [torch.randn(shape.batch_size, count, width, generator=generator, device=device, dtype=dtype)
               for count in counts]
    return [tensor.requires_grad_(index < 3) for index, tensor in enumerate(tensors)]


def _pass(compute: Attend, given: list[Tensor], num_heads: int) -> tuple[Tensor, ...]:
    """The result and the gradients of q, k and v."""
    *inputs, gradient = given
    result = compute(*inputs, num_heads)
    return result.detach(), *torch.autograd.grad(result, inputs, gradient)


def _agree(found: Tensor, expected: Tensor) -> bool:
    limit = max(4 * torch.finfo(expected.dtype).eps, 1e-4)
    return ((found.float() - expected.float()).norm() <= limit * expected.float().norm()).item()


def _milliseconds(compute: Attend, given: list[Tensor], num_heads: int) -> float:
    for _ in range(WARM_UP):
        _pass(compute, given, num_heads)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(REPEATS):
        _pass(compute, given, num_heads)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / REPEATS


def _refusal(error: Exception) -> str:
    text = str(error)
    known = [words for said, words in REFUSALS.items() if said in text]
    return known[0] if known else f"xformers fails here ({type(error).__name__}: {text.splitlines()[0] if text else ''})"


def main() -> int:
    """The choice for the first GPU at SDXL's sizes, or for the processor, as JSON; for `crumb doctor`."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    torch.use_deterministic_algorithms(True, warn_only=True)  # as in a run
    has_bf16 = device.type == "cuda" and torch.cuda.get_device_capability()[0] >= 8
    choice = choose_attention(device, torch.bfloat16 if has_bf16 else torch.float16, SDXL_SHAPES)
    print(json.dumps({"name": choice.name, "reason": choice.reason}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
