"""The trainable network: LoRA layers put in place of linears and convolutions.

            x ──► W (frozen) ───────────► + ──► y
             └──► A (R, in) ► B (out, R) ─┘ × alpha / rank

A starts random and B at zero, so training starts at the base model exactly (Hu et al. 2021, section 4.1).
"""

import hashlib
import math
import re
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crumb.engine.model.keys import lora_stem
from crumb.kernels.linear import Layer, linear
from crumb.kernels.norm_conv import ConvLayer
from crumb.profiles.blocks import block_of
from crumb.profiles.plan import Plan

ATTENTION = re.compile(r".*\.attn[12]\.to_(q|k|v|out\.0)")
FEED_FORWARD = re.compile(r".*\.attentions\.\d+\.(proj_in|proj_out|transformer_blocks\.\d+\.ff\.net\.(0\.proj|2))")
CONVOLUTION = re.compile(
    r".*\.resnets\.\d+\.(conv1|conv2|conv_shortcut|time_emb_proj)|.*\.(downsamplers|upsamplers)\.0\.conv")
"""The modules kohya's LoCon adds; conv_in, conv_out and the embeddings stay out, as no other trainer touches them."""

TARGETS = {
    "attention": (ATTENTION,),
    "attention+ff": (ATTENTION, FEED_FORWARD),
    "attention+ff+conv": (ATTENTION, FEED_FORWARD, CONVOLUTION),
}


@dataclass(frozen=True)
class Dropout:
    """What is left out at random while training: values of x Aᵀ, whole ranks of a picture, whole modules of a pass."""

    network: float = 0.0
    rank: float = 0.0
    module: float = 0.0

    @property
    def is_on(self) -> bool:
        return max(self.network, self.rank, self.module) > 0


class LoRALayer(nn.Module):
    """What linears and convolutions share. lora_A and lora_B are fp32 masters; `rate` is a factor on the learning rate."""

    def __init__(self, base: nn.Module, rank: int, alpha: float, rate: float, dropout: Dropout):
        super().__init__()
        self.base = base
        self.rank, self.alpha, self.scaling = rank, alpha, alpha / rank
        self.rate, self.dropout = rate, dropout

    def is_left_out(self) -> bool:
        """Draws whether this pass does without the module."""
        return bool(self.training and self.dropout.module) and torch.rand(()).item() < self.dropout.module

    def draw(self, down: torch.Size, ranks: tuple[int, ...], like: Tensor) -> tuple[float, Tensor | None]:
        """The scaling of a pass, and which values of x Aᵀ, shaped `down`, stay in it (bool; None for all).

        Whole ranks are drawn for each picture: `ranks` is `down` with 1 for all but pictures and ranks.
        """
        kept, scaling = None, self.scaling
        if self.training and self.dropout.network:
            kept = F.dropout(like.new_ones(down), self.dropout.network) != 0
            scaling /= 1 - self.dropout.network
        if self.training and self.dropout.rank:
            kept_ranks = (torch.rand(down[0], self.rank, device=like.device) >= self.dropout.rank).view(ranks)
            kept = kept_ranks if kept is None else kept & kept_ranks
            scaling /= 1 - self.dropout.rank
        return scaling, kept


class LoRALinear(LoRALayer):
    """A frozen nn.Linear with a LoRA beside it. lora_A (rank, in), lora_B (out, rank)."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, rate: float = 1.0, dropout: Dropout = Dropout()):
        super().__init__(base, rank, alpha, rate, dropout)
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.zeros(rank, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))

    def layer(self, x: Tensor) -> Layer:
        """What computes a pass of (B, ..., in); of x only its other sizes and its format matter. Draws what is left out."""
        if self.is_left_out():
            return Layer(self.base.weight, self.base.bias)
        num_pictures, num_tokens = len(x), math.prod(x.shape[1:-1])
        scaling, kept = self.draw(torch.Size((num_pictures, num_tokens, self.rank)), (num_pictures, 1, self.rank), x)
        return Layer(self.base.weight, self.base.bias, self.lora_A, self.lora_B, scaling, kept)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.layer(x))


class LoRAConv2d(LoRALayer):
    """A frozen nn.Conv2d with a LoRA beside it: lora_A (rank, in, kh, kw) strides and pads as the base, lora_B is 1x1."""

    def __init__(self, base: nn.Conv2d, rank: int, alpha: float, rate: float = 1.0, dropout: Dropout = Dropout()):
        super().__init__(base, rank, alpha, rate, dropout)
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.zeros(rank, base.in_channels, *base.kernel_size, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_channels, rank, 1, 1, device=device))

    def layer(self, x: Tensor) -> ConvLayer:
        """What computes a pass of (B, in, H, W); of x only its sizes and its format matter. Draws what is left out."""
        base = self.base
        if self.is_left_out():
            return ConvLayer(base.weight, base.bias, base.stride, base.padding)
        num_pictures, _, *size = x.shape
        size = ((n + 2 * p - k) // s + 1 for n, p, k, s in zip(size, base.padding, base.kernel_size, base.stride))
        scaling, kept = self.draw(torch.Size((num_pictures, self.rank, *size)), (num_pictures, self.rank, 1, 1), x)
        return ConvLayer(base.weight, base.bias, base.stride, base.padding, self.lora_A, self.lora_B, scaling, kept)

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer(x)
        if layer.lora_A is None:
            return self.base(x)
        down = F.conv2d(x, self.lora_A.to(x.dtype), stride=layer.stride, padding=layer.padding)
        if layer.kept is not None:
            down = down * layer.kept
        return self.base(x) + F.conv2d(down, self.lora_B.to(x.dtype)) * layer.scaling


@dataclass(frozen=True)
class Network:
    """The LoRA layers by their stem in the file, in the model's own order."""

    layers: dict[str, LoRALayer] = field(default_factory=dict)

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for layer in self.layers.values() for parameter in (layer.lora_A, layer.lora_B)]

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def train(self, mode: bool, text_learns: bool = True) -> None:
        """Dropout acts in training mode only, and in text encoders only while they learn."""
        for stem, layer in self.layers.items():
            layer.training = mode and (text_learns or not stem.startswith("lora_te"))

    def rate_groups(self, lora_plus_ratio: float) -> list[tuple[float, list[nn.Parameter]]]:
        """(factor on the learning rate, parameters) for each factor in use, B's times the ratio (Hayou et al. 2024, LoRA+)."""
        groups: dict[float, list[nn.Parameter]] = {}
        for layer in self.layers.values():
            for factor, parameter in ((1.0, layer.lora_A), (lora_plus_ratio, layer.lora_B)):
                groups.setdefault(layer.rate * factor, []).append(parameter)
        return list(groups.items())

    @torch.no_grad()
    def limit_norms(self, max_norm: float) -> None:
        """Scales A and B alike, in place, where alpha / rank · B A is longer than `max_norm` (Frobenius)."""
        for layer in self.layers.values():
            A, B = layer.lora_A.flatten(1), layer.lora_B.flatten(1)
            norm = ((B.T @ B) * (A @ A.T)).sum().clamp(min=0).sqrt() * layer.scaling
            shrink = (max_norm / norm.clamp(min=torch.finfo(norm.dtype).tiny)).clamp(max=1).sqrt()
            layer.lora_A.mul_(shrink)
            layer.lora_B.mul_(shrink)


def attach_lora(unet: nn.Module, plan: Plan) -> Network:
    """Replaces the plan's target modules of `unet` in place by LoRA layers and returns those.

    Linears and 1x1 convolutions take the block's rank, 3x3 convolutions its `conv` one, as in kohya's networks.
    Blocks whose rate is 0 stay as they are.
    """
    network = Network()
    patterns = TARGETS[plan.targets]
    for name, module in list(unet.named_modules()):
        if isinstance(module, nn.Linear | nn.Conv2d) and any(pattern.fullmatch(name) for pattern in patterns):
            stem = lora_stem(name)
            block = block_of(stem)
            rank, alpha = plan.block_ranks.get(block, plan.rank), plan.block_alphas.get(block, plan.alpha)
            if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1):
                rank = plan.conv_block_ranks.get(block, plan.conv_rank)
                alpha = plan.conv_block_alphas.get(block, plan.conv_alpha)
            if rate := plan.block_rates.get(block, 1.0):
                put_layer(network, unet, name, stem, rank, alpha, rate, plan)
    return network


def put_layer(network: Network, model: nn.Module, name: str, stem: str, rank: int, alpha: float, rate: float,
              plan: Plan) -> None:
    """Puts a LoRA layer in the place of the module `name` of `model` and enters it in `network`."""
    module = model.get_submodule(name)
    make = LoRALinear if isinstance(module, nn.Linear) else LoRAConv2d
    layer = make(module, rank, alpha, rate, Dropout(plan.network_dropout, plan.rank_dropout, plan.module_dropout))
    layer.training = False
    _initialise(layer.lora_A, f"{plan.seed} {stem}")
    parent_name, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent_name), child, layer)
    network.layers[stem] = layer


def _initialise(lora_A: nn.Parameter, seed: str) -> None:
    """Kaiming-uniform with a = sqrt(5), as nn.Linear and the other trainers do: U(-1/sqrt(fan_in), 1/sqrt(fan_in)).

    Each layer has a seed of its own, so its start does not depend on which other layers are trained.
    """
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7]))
    bound = 1 / math.sqrt(lora_A[0].numel())
    with torch.no_grad():
        lora_A.copy_(torch.empty(lora_A.shape).uniform_(-bound, bound, generator=generator))
