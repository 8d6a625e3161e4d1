"""The training loss: how far the prediction is off, and what each noise level counts.

Everything per picture first, in fp32, so that weights (noise level, mask, prior) have one place to go. B batch.
"""

import math

import torch
from torch import Tensor

from crumb.engine.train.noise import NUM_TIMESTEPS
from crumb.profiles.plan import Plan

MAX_DEBIASED_SNR = 1000.0
"""Debiased weights fall with the signal-to-noise ratio; beyond this they stay."""


def diffusion_loss(model_pred: Tensor, target: Tensor, timesteps: Tensor, schedule: Tensor, plan: Plan,
                   masks: Tensor | None = None) -> Tensor:
    """The loss of each picture, (B,) fp32. `model_pred` and `target` (B, C, H, W); `timesteps` and `schedule` on the CPU."""
    snr = signal_to_noise(schedule)[timesteps]
    c = huber_c(plan.huber_c, plan.huber_schedule, timesteps, snr).to(model_pred.device)
    distances = distance(model_pred.float(), target.float(), plan.loss_type, c)
    if masks is not None:
        distances = distances * mask_weights(masks.to(distances.device), plan.mask_floor)
    per_picture = distances.flatten(1).mean(1)
    if plan.loss_weighting == "none":
        return per_picture
    return per_picture * loss_weights(snr, plan).to(per_picture.device)


def mask_weights(masks: Tensor, floor: float) -> Tensor:
    """What each place counts: from `floor` where the mask is black to 1 where it is white, over the picture's mean.

    Divided by that mean, a small subject learns as fast as one that fills the frame. ai-toolkit does the same over a whole
    batch, OneTrainer where one asks for it, sd-scripts does not: there a mask of a tenth gives a tenth of the gradient.
    """
    weights = floor + (1 - floor) * masks
    return weights / weights.mean(dim=(1, 2, 3), keepdim=True)


def signal_to_noise(schedule: Tensor) -> Tensor:
    """ā / (1 - ā) of every noise level."""
    return schedule / (1 - schedule)


def distance(model_pred: Tensor, target: Tensor, loss_type: str, c: Tensor) -> Tensor:
    """Per value: d², or its pseudo-Huber kin 2c(√(d² + c²) - c), or that over c (smooth_l1). `c` is (B,).

    Both bend from a parabola to a straight line near |d| = c (Khrapov et al. 2024).
    """
    difference = model_pred - target
    if loss_type == "l2":
        return difference.square()
    c = c.view(-1, 1, 1, 1)
    bent = 2 * ((difference.square() + c.square()).sqrt() - c)
    return c * bent if loss_type == "huber" else bent


def huber_c(c: float, schedule: str, timesteps: Tensor, snr: Tensor) -> Tensor:
    """(B,): `c` itself, or falling from 1 to `c` with the noise level, or with the noise's share in the picture.

    exponential: c^(t / T); snr: (1 - c) / (1 + σ)² + c with σ = 1/√snr (Khrapov et al. 2024, section 4).
    """
    if schedule == "exponential":
        return torch.exp(math.log(c) * timesteps / NUM_TIMESTEPS)
    if schedule == "snr":
        return (1 - c) / (1 + snr.rsqrt()).square() + c
    return torch.full_like(snr, c)


def loss_weights(snr: Tensor, plan: Plan) -> Tensor:
    """(B,) weights of the noise levels for the plan's kind of prediction.

    min_snr: min(snr, γ) / snr, for v over snr + 1 (Hang et al. 2023, section 3.4). debiased: 1 / √snr, for v 1 / (snr + 1)
    (Yu et al. 2023, equation 15).
    """
    predicts_v = plan.prediction_type == "v_prediction"
    if plan.loss_weighting == "debiased":
        snr = snr.clamp(max=MAX_DEBIASED_SNR)
        return 1 / (snr + 1) if predicts_v else snr.rsqrt()
    if predicts_v:
        return snr.clamp(max=plan.min_snr_gamma) / (snr + 1)
    return (plan.min_snr_gamma / snr).clamp(max=1)  # this way round there is no 0 / 0 where nothing but noise is left
