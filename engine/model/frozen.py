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


def freeze_layers(unet: nn.Module, quantise: str, device: torch.device) -> None:
    """Turns all linears and convolutions into frozen ones, in place. `quantise`: no | int8 | nf4, of those in blocks.

    Where it quantises, the U-Net arrives on the device weight by weight: that never holds more than the result and one
    weight.
    """
    for name, module in unet.named_modules():
        if type(module) is nn.Linear:
            module.__class__ = FrozenLinear
        elif type(module) is nn.Conv2d:
            module.__class__ = FrozenConv2d
        else:
            continue
        if quantise != "no" and IN_BLOCKS.fullmatch(name):
            weight = module.weight
            del module.weight
            module.weight = FORMATS[quantise][weight.dim() == 4].of(weight.detach().to(device))
    if quantise != "no":
        unet.to(device)
