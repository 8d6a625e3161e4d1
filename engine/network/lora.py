"""The trainable network: LoRA layers put in place of the U-Net's linears and convolutions.

            x ──► W (frozen) ───────────► + ──► y
             └──► A (R, in) ► B (out, R) ─┘ × alpha / rank

A starts random and B at zero, so training starts at the base model exactly (Hu et al. 2021, section 4.1).
"""

import hashlib
import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crumb.engine.model.keys import lora_stem
from crumb.kernels.lora_linear import lora_linear

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


class LoRALinear(nn.Module):
    """A frozen nn.Linear with a LoRA beside it. lora_A (rank, in), lora_B (out, rank), both fp32 masters."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.base = base
        self.rank, self.alpha, self.scaling = rank, alpha, alpha / rank
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.zeros(rank, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return lora_linear(x, self.base.weight, self.base.bias, self.lora_A, self.lora_B, self.scaling)


class LoRAConv2d(nn.Module):
    """A frozen nn.Conv2d with a LoRA beside it: lora_A (rank, in, kh, kw) strides and pads as the base, lora_B is 1x1."""

    def __init__(self, base: nn.Conv2d, rank: int, alpha: float):
        super().__init__()
        self.base = base
        self.rank, self.alpha, self.scaling = rank, alpha, alpha / rank
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.zeros(rank, base.in_channels, *base.kernel_size, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_channels, rank, 1, 1, device=device))

    def forward(self, x: Tensor) -> Tensor:
        down = F.conv2d(x, self.lora_A.to(x.dtype), stride=self.base.stride, padding=self.base.padding)
        return self.base(x) + F.conv2d(down, self.lora_B.to(x.dtype)) * self.scaling


@dataclass(frozen=True)
class Network:
    """The LoRA layers by their stem in the file, in the U-Net's own order."""

    layers: dict[str, LoRALinear | LoRAConv2d]

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for layer in self.layers.values() for parameter in (layer.lora_A, layer.lora_B)]

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())


def attach_lora(unet: nn.Module, targets: str, rank: int, alpha: float, conv_rank: int, conv_alpha: float,
                seed: int) -> Network:
    """Replaces the target modules of `unet` in place by LoRA layers and returns those.

    Linears and 1x1 convolutions take `rank`, 3x3 convolutions `conv_rank`, as kohya's networks do.
    """
    patterns = TARGETS[targets]
    chosen = [
        (name, module) for name, module in unet.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and any(pattern.fullmatch(name) for pattern in patterns)
    ]
    layers = {}
    for name, module in chosen:
        if isinstance(module, nn.Linear):
            layer = LoRALinear(module, rank, alpha)
        elif module.kernel_size == (1, 1):
            layer = LoRAConv2d(module, rank, alpha)
        else:
            layer = LoRAConv2d(module, conv_rank, conv_alpha)
        stem = lora_stem(name)
        _initialise(layer.lora_A, f"{seed} {stem}")
        parent_name, _, child = name.rpartition(".")
        setattr(unet.get_submodule(parent_name), child, layer)
        layers[stem] = layer
    return Network(layers)


def _initialise(lora_A: nn.Parameter, seed: str) -> None:
    """Kaiming-uniform with a = sqrt(5), as nn.Linear and the other trainers do: U(-1/sqrt(fan_in), 1/sqrt(fan_in)).

    Each layer has a seed of its own, so its start does not depend on which other layers are trained.
    """
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7]))
    bound = 1 / math.sqrt(lora_A[0].numel())
    with torch.no_grad():
        lora_A.copy_(torch.empty(lora_A.shape).uniform_(-bound, bound, generator=generator))
