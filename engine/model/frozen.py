"""The U-Net's frozen layers: they keep nothing for backward, and their weights may be int8 or NF4."""

import re

import torch
from torch import Tensor, nn

from crumb.kernels.conv import conv2d_frozen
from crumb.kernels.linear import Layer, linear
from crumb.kernels.quantize import Int8Weight, NF4Weight

IN_BLOCKS = re.compile(
    r".*\.(attentions\.\d+\.(proj_in|proj_out|transformer_blocks\..*)|resnets\.\d+\.conv\w*|\w+samplers\.0\.conv)")
"""The layers that hold 99 % of the weights. The others, at the U-Net's ends and on the time embedding, stay exact."""

FORMATS = {"int8": (Int8Weight, Int8Weight), "nf4": (NF4Weight, Int8Weight)}
"""Of linears and convolutions: blocks of 64 do not fit a convolution's weight, one scale a channel does."""


class FrozenLinear(nn.Linear):
    """`weight` is a parameter, or an Int8Weight or NF4Weight."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, Layer(self.weight, self.bias))


class FrozenConv2d(nn.Conv2d):
    """`weight` is a parameter or an Int8Weight."""

    def forward(self, x: Tensor) -> Tensor:
        return conv2d_frozen(x, self.weight, self.bias, self.stride, self.padding)


FROZEN = {nn.Linear: FrozenLinear, nn.Conv2d: FrozenConv2d}


def freeze_layers(unet: nn.Module) -> None:
    """Turns all linears and convolutions into frozen ones, in place."""
    for module in unet.modules():
        if type(module) in FROZEN:
            module.__class__ = FROZEN[type(module)]


def format_of(name: str, shape: torch.Size, quantise: str) -> type[Int8Weight] | type[NF4Weight] | None:
    """What the U-Net's tensor of that name is kept as where `quantise` is no | int8 | nf4; None is as it is."""
    module, _, leaf = name.rpartition(".")
    if quantise == "no" or leaf != "weight" or len(shape) < 2 or not IN_BLOCKS.fullmatch(module):
        return None
    return FORMATS[quantise][len(shape) == 4]
