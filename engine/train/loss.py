"""The training loss."""

from torch import Tensor
from torch.nn import functional as F


def diffusion_loss(model_pred: Tensor, target: Tensor) -> Tensor:
    """Mean squared error in fp32 over everything but the batch, then over the batch (a scalar)."""
    per_picture = F.mse_loss(model_pred.float(), target.float(), reduction="none").flatten(1).mean(1)
    return per_picture.mean()
