"""Every way to compute a frozen linear layer with a LoRA, on the shapes of SDXL's U-Net at 1024 x 1024 and batch 1.

x has four channels 20 times the others, as behind a LayerNorm; rows of W differ in size. Errors are relative to float64 with
the weight as the arm has it after quantising; `weight_error` is what quantising did to the weight.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from timing import Arm, Case, relative_error
from torch import Tensor, nn
from torch.nn import functional as F

from crumb.kernels.lora_linear import lora_linear
from crumb.kernels.lora_linear_int8 import lora_linear_int8
from crumb.kernels.lora_linear_nf4 import lora_linear_nf4
from crumb.kernels.quantize import Int8Weight, NF4Weight

TRANSFORMERS = {640: 5, 1280: 6}
"""Transformer2DModels by width: two on the way down, three on the way up, and one in the middle of 1280."""
DEPTHS = {640: 2, 1280: 10}
TOKENS = {640: 4096, 1280: 1024}
TEXT_TOKENS, TEXT_WIDTH = 77, 2048
TINY = {640: 64, 1280: 128, 2048: 192, 2560: 256, 5120: 512, 10240: 1024, 4096: 64, 1024: 32, 77: 20}
"""Widths and tokens of a run on a processor."""

Shape = tuple[int, int, int]


@cache
def layer_counts() -> dict[Shape, int]:
    """(rows, in, out) of the linears in SDXL's transformers, proj_in and proj_out included, and how many there are: 722."""
    counts: dict[Shape, int] = {}
    for width, models in TRANSFORMERS.items():
        tokens, blocks = TOKENS[width], models * DEPTHS[width]
        for shape, number in (
                ((tokens, width, width), 6 * blocks + 2 * models),  # q, k, v, out; q, out
                ((TEXT_TOKENS, TEXT_WIDTH, width), 2 * blocks),     # k, v
                ((tokens, width, 8 * width), blocks),               # feed-forward
                ((tokens, 4 * width, width), blocks)):
            counts[shape] = number
    return counts


def cases(device: torch.device, dtype: torch.dtype, tiny: bool, everything: bool) -> Iterator[Case]:
    for shape, number in layer_counts().items():
        for rank in ((8, 16, 64, 128) if everything else (16,) if tiny else (16, 64)):
            size = tuple(TINY[length] for length in shape) if tiny else shape
            problem = cache(partial(Problem.make, size, rank, device, dtype, max(shape[1:]) > TEXT_WIDTH))
            arms = {name: partial(_arm, build, problem) for name, build in ARMS.items()
                    if everything or "compile" not in name}
            rows, inside, out = shape
            yield Case("linear", f"{rows}x{inside}->{out} rank {rank}", arms, number, {"shape": shape, "rank": rank})


@dataclass(eq=False)
class Problem:
    """One layer's tensors, shared by all arms; A and B as fp32 masters."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    dy: Tensor
    scaling: float = 0.5

    @classmethod
    def make(cls, shape: Shape, rank: int, device: torch.device, dtype: torch.dtype, has_bias: bool) -> "Problem":
        rows, inside, out = shape
        generator = torch.Generator(device).manual_seed(rows + inside + out + rank)

        def random(*size):
            return torch.randn(*size, generator=generator, device=device)

        x = random(rows, inside)
        x[:, :inside // 2:inside // 8] *= 20
        weight = random(out, inside) * random(out, 1).mul(0.4).exp() / math.sqrt(inside)
        return cls(x.to(dtype).requires_grad_(), weight.to(dtype), random(out).to(dtype) if has_bias else None,
                   random(rank, inside) / math.sqrt(inside), random(out, rank) / math.sqrt(rank),
                   random(rows, out).to(dtype))

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    def masters(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return tuple(factor.detach().to(dtype, copy=True).requires_grad_() for factor in (self.lora_A, self.lora_B))

    def exact(self, dense: Tensor) -> dict[str, Tensor]:
        """y, dX, dA and dB in float64. The factors count as they are in 16 bit, which is how every arm multiplies them."""
        x, lora_A, lora_B = (t.detach().to(self.dtype).double() for t in (self.x, self.lora_A, self.lora_B))
        dy, dense, down = self.dy.double(), dense.double(), x @ lora_A.T
        y = x @ dense.T + (0 if self.bias is None else self.bias.double()) + self.scaling * (down @ lora_B.T)
        d_down = self.scaling * (dy @ lora_B)
        return {"y": y, "dX": dy @ dense + d_down @ lora_A, "dA": d_down.T @ x, "dB": self.scaling * (dy.T @ down)}


@dataclass(eq=False)
class Layer:
    """What an arm brings: a function of x, its LoRA factors, and its weight as it multiplies by it."""

    forward: Callable[[Tensor], Tensor]
    factors: tuple[Tensor, ...]
    dense: Callable[[], Tensor]
    weight_bytes: int
    weights: list[Tensor]
    facts: dict[str, Any] | None = None


def _arm(build: Callable[[Problem], Layer], problem: Callable[[], Problem]) -> Arm:
    problem = problem()
    layer, leaves = build(problem), [problem.x]
    leaves += layer.factors
    names = ("y", "dX", "dA", "dB")

    def forward():
        return layer.forward(problem.x)

    def both():
        y = layer.forward(problem.x)
        return y, *torch.autograd.grad(y, leaves, problem.dy)

    def outputs():
        return dict(zip(names, both()))

    def reference():
        return problem.exact(layer.dense()) if layer.factors else {}

    arm = Arm({"forward": forward, "forward+backward": both}, outputs, [*layer.weights, *layer.factors],
              {"weight_bytes": layer.weight_bytes, **(layer.facts or {})}, reference)
    forward()  # bitsandbytes makes its weight at the first use
    arm.facts["weight_error"] = relative_error(layer.dense(), problem.weight)
    return arm


def floor(problem: Problem) -> Layer:
    return Layer(lambda x: F.linear(x, problem.weight, problem.bias), (), lambda: problem.weight, problem.weight.nbytes,
                 [problem.weight])


def with_peft(base: nn.Module, problem: Problem, dtype: torch.dtype, **loaded_as: bool) -> tuple[nn.Module, tuple]:
    """The layer inside PEFT's, and its factors."""
    from peft import LoraConfig, inject_adapter_in_model

    holder = nn.Module()
    holder.linear = base
    for name, value in loaded_as.items():
        setattr(holder, name, value)
    rank = len(problem.lora_A)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank * problem.scaling, target_modules=["linear"]), holder)
    layer = holder.linear
    if type(layer).__name__ not in ("Linear", "Linear4bit", "Linear8bitLt") or not hasattr(layer, "lora_A"):
        raise TypeError(f"PEFT put a {type(layer).__name__} there")
    for part, value in ((layer.lora_A, problem.lora_A), (layer.lora_B, problem.lora_B)):
        part.default.to(problem.x.device, dtype).weight.data.copy_(value)
    return layer, (layer.lora_A.default.weight, layer.lora_B.default.weight)


def _plain(problem: Problem) -> nn.Linear:
    out, inside = problem.weight.shape
    with torch.device("meta"):
        base = nn.Linear(inside, out, bias=problem.bias is not None)
    base.weight = nn.Parameter(problem.weight, requires_grad=False)
    if problem.bias is not None:
        base.bias = nn.Parameter(problem.bias, requires_grad=False)
    return base


def peft_16bit(problem: Problem) -> Layer:
    layer, factors = with_peft(_plain(problem), problem, problem.dtype)
    return Layer(layer, factors, lambda: problem.weight, problem.weight.nbytes, [problem.weight])


def peft_autocast(problem: Problem) -> Layer:
    layer, factors = with_peft(_plain(problem), problem, torch.float32)

    def forward(x):
        with torch.autocast(x.device.type, x.dtype):
            return layer(x)

    return Layer(forward, factors, lambda: problem.weight, problem.weight.nbytes, [problem.weight])


def peft_compiled(problem: Problem) -> Layer:
    layer, factors = with_peft(_plain(problem), problem, problem.dtype)
    torch._dynamo.reset()
    compiled, start = torch.compile(layer), time.perf_counter()
    compiled(problem.x).backward(problem.dy)
    for leaf in (problem.x, *factors):
        leaf.grad = None
    seconds = time.perf_counter() - start
    return Layer(compiled, factors, lambda: problem.weight, problem.weight.nbytes, [problem.weight], {"compile_s": seconds})


def bitsandbytes_nf4(problem: Problem) -> Layer:
    import bitsandbytes as bnb

    out, inside = problem.weight.shape
    base = bnb.nn.Linear4bit(inside, out, bias=problem.bias is not None, compute_dtype=problem.dtype, quant_type="nf4",
                             compress_statistics=True, device="meta")
    base.weight = bnb.nn.Params4bit(problem.weight.detach().cpu(), requires_grad=False, quant_type="nf4",
                                    compress_statistics=True)
    if problem.bias is not None:
        base.bias = nn.Parameter(problem.bias.detach().clone(), requires_grad=False)
    base = base.to(problem.x.device)
    layer, factors = with_peft(base, problem, problem.dtype, is_loaded_in_4bit=True)

    def dense():
        return bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state)

    state = base.weight.quant_state
    parts = [base.weight.data, state.absmax, *([state.state2.absmax] if state.state2 else [])]
    return Layer(layer, factors, dense, sum(part.nbytes for part in parts), parts)


def bitsandbytes_int8(problem: Problem) -> Layer:
    import bitsandbytes as bnb

    out, inside = problem.weight.shape
    base = bnb.nn.Linear8bitLt(inside, out, bias=problem.bias is not None, has_fp16_weights=False, threshold=6.0,
                               device="meta")
    base.weight = bnb.nn.Int8Params(problem.weight.detach().cpu(), requires_grad=False, has_fp16_weights=False)
    if problem.bias is not None:
        base.bias = nn.Parameter(problem.bias.detach().clone(), requires_grad=False)
    base = base.to(problem.x.device)
    layer, factors = with_peft(base, problem, problem.dtype, is_loaded_in_8bit=True)

    def parts():
        scales = base.state.SCB if base.state.SCB is not None else base.weight.SCB
        return (base.state.CB if base.state.CB is not None else base.weight.data), scales

    def dense():
        codes, scales = parts()
        return codes.float() * (scales.float()[:, None] / 127)

    return Layer(layer, factors, dense, out * inside + 4 * out, [base.weight.data])


class UnfusedInt8(torch.autograd.Function):
    """W8A8 out of torch's own operations: a scale a row of x (of dy · w), torch._int_mm, scales, the LoRA by addmm."""

    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_B, scaling):
        lora_A16, lora_B16 = lora_A.to(x.dtype), lora_B.to(x.dtype)
        codes, scales = rounded(x)
        y = (torch._int_mm(codes, weight.values.T).float() * scales * weight.scales).to(x.dtype)
        if bias is not None:
            y += bias
        down = x @ lora_A16.T
        ctx.save_for_backward(x, down, lora_A, lora_B)
        ctx.weight, ctx.scaling = weight, scaling
        return y.addmm_(down, lora_B16.T, alpha=scaling)

    @staticmethod
    def backward(ctx, dy):
        x, down, lora_A, lora_B = ctx.saved_tensors
        d_down = (dy @ lora_B.to(dy.dtype)).mul_(ctx.scaling)
        codes, scales = rounded(dy.float() * ctx.weight.scales)
        # int8 products want the summed index innermost in both.
        dx = (torch._int_mm(codes, ctx.weight.values.T.contiguous().T).float() * scales).to(dy.dtype)
        dx.addmm_(d_down, lora_A.to(dy.dtype))
        return (dx, None, None, (d_down.T @ x).to(lora_A.dtype), (dy.T @ down).mul_(ctx.scaling).to(lora_B.dtype), None)


def rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
    scales = rows.abs().amax(1, keepdim=True).float().div_(127).clamp_min_(1e-30)
    return (rows / scales).round_().to(torch.int8), scales


def _crumb(function: Callable, kind: Callable[[Tensor], Any], problem: Problem) -> Layer:
    weight, factors = kind(problem.weight), problem.masters(torch.float32)
    dense = (lambda: weight) if isinstance(weight, Tensor) else (lambda: weight.dequantised(torch.float32))
    parts = [weight] if isinstance(weight, Tensor) else [part for part in vars(weight).values() if isinstance(part, Tensor)]
    return Layer(lambda x: function(x, weight, problem.bias, *factors, problem.scaling), factors, dense,
                 sum(part.nbytes for part in parts), parts)


ARMS: dict[str, Callable[[Problem], Layer]] = {
    "floor: no LoRA": floor,
    "PEFT 16-bit": peft_16bit,
    "PEFT fp32, autocast": peft_autocast,
    "PEFT, compiled": peft_compiled,
    "bitsandbytes NF4, PEFT": bitsandbytes_nf4,
    "bitsandbytes int8, PEFT": bitsandbytes_int8,
    "unfused W8A8": partial(_crumb, UnfusedInt8.apply, Int8Weight.of),
    "crumb 16-bit": partial(_crumb, lora_linear, lambda weight: weight),
    "crumb int8": partial(_crumb, lora_linear_int8, Int8Weight.of),
    "crumb NF4": partial(_crumb, lora_linear_nf4, NF4Weight.of),
}
