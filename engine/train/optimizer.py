"""Optimizers by the plan's names, from the best-kept implementation there is."""

import torch
from torch.optim import Optimizer

from crumb.kernels.adamw_8bit import AdamW8bit
from crumb.kernels.flat_optimizer import FlatOptimizer
from crumb.kernels.prodigy_8bit import Prodigy8bit
from crumb.profiles.errors import RequestError
from crumb.profiles.plan import Plan


def make_optimizer(plan: Plan, groups: list[tuple[float, list]]) -> Optimizer:
    """The plan's optimizer over (rate factor, parameters) groups. 8-bit ones take the parameters into a buffer of theirs.

    The factors stand in the optimizer's groups as `rate_factor`; whoever sets the rate multiplies by them.
    """
    parameters = [{"params": members, "rate_factor": factor} for factor, members in groups]
    arguments = {name: tuple(value) if isinstance(value, list) else value for name, value in plan.optimizer_args.items()}
    make = {"AdamW8bit": AdamW8bit, "AdamW": _adamw, "Prodigy": _prodigy, "Prodigy8bit": Prodigy8bit,
            "DAdaptAdam": _dadapt_adam, "Adafactor": _adafactor, "Lion": _lion}[plan.optimizer]
    try:
        return make(parameters, lr=plan.learning_rate, **arguments)
    except (TypeError, ValueError) as error:
        raise RequestError(f"optimizer_args {plan.optimizer_args} don't suit {plan.optimizer}: {error}. "
                           f"Mend them in [optimizer] of the plan.") from None


def effective_rate(optimizer: Optimizer, learning_rate: float) -> float:
    """What a step's rate comes to: times d where the optimizer adapts it, its own where the optimizer ignores it."""
    group = optimizer.param_groups[0]
    if group.get("relative_step"):  # Adafactor's, before each tensor's own size scales it (Shazeer & Stern 2018, section 8)
        step = next((state["step"] for state in optimizer.state.values()), 1)
        return min(1e-6 * step if group["warmup_init"] else 1e-2, step**-0.5)
    return learning_rate * float(group.get("d", 1.0))


def clip_gradients(optimizer: Optimizer, parameters: list[torch.nn.Parameter], max_norm: float) -> float:
    """The norm of all gradients; where it is larger than `max_norm` they count as scaled down to it."""
    if isinstance(optimizer, FlatOptimizer):
        return optimizer.clip_gradients(max_norm).item()
    return torch.nn.utils.clip_grad_norm_(parameters, max_norm).item()


def _adamw(parameters, **arguments) -> Optimizer:
    return torch.optim.AdamW(parameters, fused=True, **arguments)


def _prodigy(parameters, **arguments) -> Optimizer:
    try:
        from prodigyopt import Prodigy
    except ImportError:
        raise RequestError("The plan's optimizer is Prodigy, but the package prodigyopt is not installed. "
                           "`pip install prodigyopt`, or set optimizer = \"AdamW\" and learning_rate = 1e-4.") from None
    return Prodigy(parameters, **arguments)


def _dadapt_adam(parameters, decouple: bool = False, use_bias_correction: bool = False, **arguments) -> Optimizer:
    from pytorch_optimizer import DAdaptAdam

    return DAdaptAdam(parameters, weight_decouple=decouple, bias_correction=use_bias_correction, **arguments)


def _adafactor(parameters, lr: float, relative_step: bool = True, **arguments) -> Optimizer:
    from transformers.optimization import Adafactor

    return Adafactor(parameters, lr=None if relative_step else lr, relative_step=relative_step, **arguments)


def _lion(parameters, **arguments) -> Optimizer:
    from pytorch_optimizer import Lion

    return Lion(parameters, **arguments)
