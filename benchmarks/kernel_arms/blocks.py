"""SDXL's two kinds of block, forward and backward: as diffusers and PEFT compute them, and as crumb does.

Errors of y and dX are relative to diffusers' block in fp32 with the same weights, its LoRAs written out; with a base in int8
or NF4 they hold what quantising the weights did. Trainers usually checkpoint ("recomputed"): that arm keeps the block's
input alone.
"""

import copy
import zlib
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from linears import TEXT_TOKENS, TEXT_WIDTH, TINY, TOKENS
from timing import Arm, Case
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

RANK = 16
SCALING = 0.5
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj", "net.2"]
TIME_WIDTH = 1280


def cases(device: torch.device, dtype: torch.dtype, tiny: bool, everything: bool) -> Iterator[Case]:
    for width, times in ((640, 10), (1280, 60)):
        sizes = [TINY[length] if tiny else length for length in (TOKENS[width], width, TEXT_TOKENS, TEXT_WIDTH)]
        parts = cache(partial(_transformer_parts, device, dtype, *sizes))
        yield Case("block", f"transformer block {width}, {TOKENS[width]} tokens, rank {RANK}",
                   {name: partial(build, parts) for name, build in TRANSFORMER_ARMS.items()}, times, counts_launches=True)
    for inside, out in ((320, 320), (960, 320)):
        size = [inside // 10, out // 10, 8, 64] if tiny else [inside, out, 128, TIME_WIDTH]
        parts = cache(partial(_resnet_parts, device, dtype, *size))
        yield Case("block", f"resnet block {inside}->{out}@128²",
                   {name: partial(build, parts) for name, build in RESNET_ARMS.items()}, counts_launches=True)


class Parts:
    """A block in fp32 with diffusers' own computation, its inputs in fp32, and how it is called with them."""

    def __init__(self, block: nn.Module, x: Tensor, other: Tensor, dy: Tensor, call: Callable, dtype: torch.dtype):
        self.block, self.x, self.other, self.dy, self.call, self.dtype = block, x, other, dy, call, dtype
        self.right: dict[str, Tensor] | None = None

    def reference(self) -> dict[str, Tensor]:
        if self.right is None:
            block = copy.deepcopy(self.block)
            if self.x.dim() == 3:
                _hook_loras(block)
            x = self.x.to(self.dtype).float().requires_grad_()
            y = self.call(block, x, self.other.to(self.dtype).float())
            self.right = {"y": y.detach(), "dX": torch.autograd.grad(y, x, self.dy.to(self.dtype).float())[0]}
        return self.right


def _transformer_parts(device, dtype, tokens, width, text_tokens, text_width) -> Parts:
    from diffusers.models.attention import BasicTransformerBlock

    torch.manual_seed(width)
    with torch.device(device):
        block = BasicTransformerBlock(width, width // 64, 64, cross_attention_dim=text_width).requires_grad_(False)
        x, text, dy = torch.randn(1, tokens, width), torch.randn(1, text_tokens, text_width), torch.randn(1, tokens, width)
    _as_16_bit(block, dtype)
    return Parts(block, x, text, dy, lambda block, x, text: block(x, None, text), dtype)


def _resnet_parts(device, dtype, inside, out, side, time_width) -> Parts:
    from diffusers.models.resnet import ResnetBlock2D

    torch.manual_seed(inside)
    with torch.device(device):
        block = ResnetBlock2D(in_channels=inside, out_channels=out, temb_channels=time_width, eps=1e-5).requires_grad_(False)
        x, temb, dy = torch.randn(1, inside, side, side), torch.randn(1, time_width), torch.randn(1, out, side, side)
    _as_16_bit(block, dtype)
    return Parts(block, x, temb, dy, lambda block, x, temb: block(x, temb), dtype)


def _as_16_bit(block: nn.Module, dtype: torch.dtype) -> None:
    """Rounds the weights, so that the reference in fp32 has those that the arms have."""
    for parameter in block.parameters():
        parameter.data = parameter.data.to(dtype).float()


def _fill(name: str, factor: Tensor) -> None:
    """A of usual size, B as after some training: each layer's the same in all arms."""
    values = torch.randn(factor.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    factor.data.copy_(values / factor.shape[1] ** 0.5 * (1 if name.endswith("A") else 0.3))


def _with_peft(block: nn.Module, dtype: torch.dtype) -> nn.Module:
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK * SCALING, target_modules=TARGETS), block)
    for name, module in block.named_modules():
        if hasattr(module, "lora_A"):
            for part in ("lora_A", "lora_B"):
                getattr(module, part).default.to(dtype)
                _fill(f"{name} {part}", getattr(module, part).default.weight)
    return block


def _hook_loras(block: nn.Module) -> None:
    """The same written out, for the reference."""
    def change(lora_A, lora_B, _, inputs, output):
        return output + SCALING * (inputs[0] @ lora_A.T @ lora_B.T)

    for name, module in block.named_modules():
        if any(name == target or name.endswith(f".{target}") for target in TARGETS):
            factors = [module.weight.new_empty(size) for size in ((RANK, module.in_features), (module.out_features, RANK))]
            for part, factor in zip(("lora_A", "lora_B"), factors):
                _fill(f"{name} {part}", factor)
            module.register_forward_hook(partial(change, *factors))


def _arm(parts: Parts, block: nn.Module, dtype: torch.dtype, call: Callable, layout=torch.contiguous_format,
         facts: dict[str, Any] | None = None) -> Arm:
    """Forward and backward through `block`, whose inputs are 16 bit."""
    x = parts.x.to(dtype)
    x, dy = (t.to(dtype).contiguous(memory_format=layout if t.dim() == 4 else torch.contiguous_format)
             for t in (x, parts.dy))
    x.requires_grad_()
    other = parts.other.to(dtype)
    factors = [parameter for parameter in block.parameters() if parameter.requires_grad]

    def forward():
        return call(block, x, other)

    def both():
        y = forward()
        return y, *torch.autograd.grad(y, [x, *factors], dy.to(y.dtype))

    weights = [*block.parameters(), *block.buffers(), *_quantised(block)]
    facts = {"weight_bytes": sum(weight.nbytes for weight in weights if not weight.requires_grad), **(facts or {})}
    return Arm({"forward": forward, "forward+backward": both}, lambda: dict(zip(("y", "dX"), both())), weights, facts,
               parts.reference)


def _quantised(block: nn.Module) -> list[Tensor]:
    found = [vars(module)["weight"] for module in block.modules() if "weight" in vars(module)]
    return [tensor for weight in found for tensor in vars(weight).values() if isinstance(tensor, Tensor)]


def _diffusers(parts: Callable[[], Parts], lora_dtype: torch.dtype | None = None, recompute: bool = False,
               layout=torch.contiguous_format) -> Arm:
    """`lora_dtype`: fp32 runs under autocast, as most trainers do; None is that of the base."""
    parts = parts()
    block = copy.deepcopy(parts.block).to(parts.dtype, memory_format=layout).train()
    if parts.x.dim() == 3:
        block = _with_peft(block, lora_dtype or parts.dtype)

    def call(block, x, other):
        with torch.autocast(x.device.type, x.dtype, enabled=lora_dtype is not None):
            if recompute:
                return checkpoint(parts.call, block, x, other, use_reentrant=False)
            return parts.call(block, x, other)

    return _arm(parts, block, parts.dtype, call, layout)


def _crumb(parts: Callable[[], Parts], quantise: str = "no", keep_int8: bool = False) -> Arm:
    """The block within a U-Net that holds nothing else, made lean as engine/job.py does it."""
    from crumb.engine.model.frozen import format_of, freeze_layers
    from crumb.engine.model.lean import make_lean
    from crumb.engine.model.weights import place
    from crumb.engine.network.lora import LoRALayer, put_layer

    parts = parts()
    block = copy.deepcopy(parts.block).to(parts.dtype, memory_format=torch.channels_last)
    unet, level, model = nn.Module(), nn.Module(), nn.Module()
    is_transformer = parts.x.dim() == 3
    model.transformer_blocks = nn.ModuleList([block] if is_transformer else [])
    level.attentions = nn.ModuleList([model])
    level.resnets = nn.ModuleList([] if is_transformer else [block])
    unet.down_blocks, unet.conv_norm_out = nn.ModuleList([level]), nn.GroupNorm(1, 1)
    freeze_layers(unet)
    for name, weight in list(unet.named_parameters()):
        if quantised := format_of(name, weight.shape, quantise):
            place(unet, name, quantised.of(weight.detach()))
    if is_transformer:
        _put_loras(unet, put_layer)
    for name, module in block.named_modules():
        if isinstance(module, LoRALayer):
            for part in ("lora_A", "lora_B"):
                _fill(f"{name} {part}", getattr(module, part))
    make_lean(unet, keep_int8)
    return _arm(parts, block, parts.dtype, parts.call, torch.channels_last)


def _put_loras(unet: nn.Module, put_layer: Callable) -> None:
    from crumb.engine.network.lora import TARGETS as PATTERNS
    from crumb.engine.network.lora import Network
    from crumb.profiles.plan import Plan

    plan = Plan(name="benchmark", created="2026-01-01T00:00:00+00:00", base_model="none", images="none",
                resolution=1024, mixed_precision="bf16", optimizer="AdamW", device="cpu")
    network, patterns = Network(), PATTERNS["attention+ff"]
    for name, module in list(unet.named_modules()):
        if isinstance(module, nn.Linear) and any(pattern.fullmatch(name) for pattern in patterns):
            put_layer(network, unet, name, name, RANK, RANK * SCALING, 1.0, plan)
    if len(network.layers) != 10:
        raise AssertionError(f"{len(network.layers)} LoRA layers, not 10")


TRANSFORMER_ARMS: dict[str, Callable] = {
    "diffusers, PEFT 16-bit": _diffusers,
    "diffusers, PEFT fp32, autocast": partial(_diffusers, lora_dtype=torch.float32),
    "diffusers, PEFT fp32, autocast, recomputed": partial(_diffusers, lora_dtype=torch.float32, recompute=True),
    "crumb 16-bit": _crumb,
    "crumb 16-bit, int8 activations": partial(_crumb, keep_int8=True),
    "crumb int8": partial(_crumb, quantise="int8"),
    "crumb int8, int8 activations": partial(_crumb, quantise="int8", keep_int8=True),
    "crumb NF4": partial(_crumb, quantise="nf4"),
    "crumb NF4, int8 activations": partial(_crumb, quantise="nf4", keep_int8=True),
}
RESNET_ARMS: dict[str, Callable] = {
    "diffusers": _diffusers,
    "diffusers, channels_last": partial(_diffusers, layout=torch.channels_last),
    "diffusers, autocast": partial(_diffusers, lora_dtype=torch.float32),
    "crumb 16-bit": _crumb,
    "crumb int8": partial(_crumb, quantise="int8"),
}
