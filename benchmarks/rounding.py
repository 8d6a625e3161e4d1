"""What rounding the weight and the activations does to one linear layer, on the shapes of SDXL's U-Net; needs no GPU.

    python -P benchmarks/rounding.py

Prints the table of docs/kernels.md: for each way of rounding the least and the most relative error of y = x Wᵀ and of
dX = dy W over the shapes. Rows of W differ in size (log-normal, standard deviation 0.4, and three or four are 4 times larger
still), and so do columns of dy (standard deviation 1); with outliers six channels of x are 20 to 60 times the others. All else
is normal noise.
"""

import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent / "kernel_arms"))

from linears import layer_counts
from timing import relative_error

from crumb.kernels.lora_linear_int8 import multiply, quantise
from crumb.kernels.quantize import Int8Weight, NF4Weight

ROWS = 256
NUM_OUTLIERS = 6


def make(inside: int, out: int, outliers: bool) -> tuple[Tensor, Tensor, Tensor]:
    """x, W and dy."""
    generator = torch.Generator().manual_seed(inside + out)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x, weight = random(ROWS, inside), random(out, inside) * random(out, 1).mul(0.4).exp() / math.sqrt(inside)
    weight[::out // 3] *= 4
    if outliers:
        x[:, ::inside // NUM_OUTLIERS][:, :NUM_OUTLIERS] *= torch.linspace(20, 60, NUM_OUTLIERS)
    return x, weight, random(ROWS, out) * random(out).exp()


def rounded(values: Tensor, dim: int | None) -> Tensor:
    """To int8 and back; one scale for all, or for each row along `dim`."""
    scale = (values.abs().amax() if dim is None else values.abs().amax(dim, keepdim=True)) / 127
    return (values / scale).round() * scale


def one_scale(x: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    weight = rounded(weight, None)
    return rounded(x, 1) @ weight.T, rounded(dy, 1) @ weight


def scale_a_row(x: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    kept = Int8Weight.of(weight)
    return rounded(x, 1) @ kept.dequantised(torch.float32).T, rounded(dy * kept.scales, 1) @ kept.values.float()


def crumb(x: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    kept = Int8Weight.of(weight)
    left, right = quantise(x)[0], quantise(dy, kept.scales)[0]
    return (multiply(left, kept.values, kept.scales, None, None, None, 1.0),
            multiply(right, kept.values.T.contiguous(), None, None, None, None, 1.0))


def weight_alone(kind: type) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    def products(x: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        dense = kind.of(weight).dequantised(torch.float32)
        return x @ dense.T, dy @ dense
    return products


WAYS = {
    "one scale for the weight, one per token": one_scale,
    "a scale per row, one per token": scale_a_row,
    "**a scale per row, groups of 128 (what crumb does)**": crumb,
    "int8 weight, exact activations": weight_alone(Int8Weight),
    "NF4 weight, exact activations": weight_alone(NF4Weight),
}


def main() -> None:
    found = {(way, column): [] for way in WAYS for column in ("y", "y, outliers", "dX")}
    for _, inside, out in layer_counts():
        for outliers in (False, True):
            x, weight, dy = make(inside, out, outliers)
            exact_y, exact_dx = x.double() @ weight.double().T, dy.double() @ weight.double()
            for name, way in WAYS.items():
                y, dx = way(x, weight, dy)
                found[name, "y, outliers" if outliers else "y"].append(relative_error(y, exact_y))
                found[name, "dX"].append(relative_error(dx, exact_dx))
    print("| | y | y, outliers | dX |\n|---|---|---|---|")
    for name in WAYS:
        ranges = [found[name, column] for column in ("y", "y, outliers", "dX")]
        print(f"| {name} | " + " | ".join(f"{100 * min(errors):.1f}-{100 * max(errors):.1f} %" for errors in ranges) + " |")


if __name__ == "__main__":
    main()
