"""What tests of kernels share: both ways of computing; a small network that LoRAs are trained in, the sizes of SDXL's LoRAs."""

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass
class SmallLoRAs:
    """Two frozen linears with a LoRA beside each; what is learned is the same network with other low-rank changes."""

    inputs: Tensor
    frozen: list[Tensor]
    wanted: list[Tensor]
    starts: list[Tensor]

    @classmethod
    def make(cls, seed: int, widths: tuple[int, ...] = (96, 160, 96), rank: int = 8) -> "SmallLoRAs":
        torch.manual_seed(seed)
        inputs = torch.randn(1024, widths[0]) * torch.exp(0.7 * torch.randn(widths[0]))  # channels of unlike sizes
        frozen = [torch.randn(rows, columns) / columns**0.5 for columns, rows in pairwise(widths)]
        changes = [0.7 / (rank * w.shape[1])**0.5 * torch.randn(len(w), rank) @ torch.randn(rank, w.shape[1])
                   for w in frozen]
        starts = [start for w in frozen for start in ((2 * torch.rand(rank, w.shape[1]) - 1) / w.shape[1]**0.5,
                                                      torch.zeros(len(w), rank))]
        return cls(inputs, frozen, [w + change for w, change in zip(frozen, changes)], starts)

    def parameters(self) -> list[torch.nn.Parameter]:
        return [torch.nn.Parameter(start.clone()) for start in self.starts]

    def loss(self, parameters: list[Tensor], step: int | None = None) -> Tensor:
        """Of one noisy batch of a step, or of all inputs."""
        x, noise = self.inputs, 0
        if step is not None:
            generator = torch.Generator().manual_seed(step)
            x = x[torch.randint(len(x), (32,), generator=generator)]
            noise = 0.3 * torch.randn(32, len(self.frozen[-1]), generator=generator)
        changed = [w + b @ a for w, a, b in zip(self.frozen, parameters[::2], parameters[1::2])]
        return F.mse_loss(_network(x, changed), _network(x, self.wanted) + noise)

    def train(self, optimizer: torch.optim.Optimizer, parameters: list[Tensor], steps: int) -> list[float]:
        """Returns the loss over all inputs after every 50 steps."""
        losses = []
        for step in range(steps):
            optimizer.zero_grad()
            self.loss(parameters, step).backward()
            optimizer.step()
            if step % 50 == 49:
                losses.append(self.loss(parameters).item())
        return losses


def _network(x: Tensor, weights: list[Tensor]) -> Tensor:
    return F.gelu(x @ weights[0].T) @ weights[1].T


@pytest.fixture(scope="session")
def small_loras():
    return SmallLoRAs.make


@pytest.fixture(scope="session")
def sdxl_shapes():
    """1,444 tensors: A and B, of rank 8, of as many linears as LoRAs of attention and feed-forward have in SDXL."""
    linears = [(640, 640), (640, 5120), (2560, 640), (1280, 1280), (2048, 1280), (1280, 10240), (5120, 1280)]
    return [shape for index in range(722) for columns, rows in [linears[index % 7]] for shape in ((8, columns), (rows, 8))]


@pytest.fixture(params=["plain", "triton"])
def way(request, monkeypatch):
    """A test that asks for it runs by plain torch and by the Triton kernels, without a GPU under the interpreter."""
    if request.param == "triton":
        pytest.importorskip("triton")
    monkeypatch.setenv("CRUMB_KERNELS", request.param)
    return request.param
