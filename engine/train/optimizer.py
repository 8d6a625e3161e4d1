"""Optimizers by the plan's names, from the best-kept implementation that works on this machine."""

from collections.abc import Callable

import torch
from torch.optim import Optimizer

from crumb.profiles.errors import RequestError
from crumb.profiles.plan import Plan


def make_optimizer(plan: Plan, groups: list[tuple[float, list]], device: torch.device,
                   warn: Callable[[str], None]) -> Optimizer:
    """The plan's optimizer over (rate factor, parameters) groups; `warn` gets a sentence where another had to stand in.

    The factors stand in the optimizer's groups as `rate_factor`; whoever sets the rate multiplies by them.
    """
    parameters = [{"params": members, "rate_factor": factor} for factor, members in groups]
    arguments = {name: tuple(value) if isinstance(value, list) else value for name, value in plan.optimizer_args.items()}
    if plan.optimizer == "AdamW8bit":
        make = _adamw_8bit(device, warn)
    else:
        make = {"AdamW": _adamw, "Prodigy": _prodigy, "DAdaptAdam": _dadapt_adam, "Adafactor": _adafactor,
                "Lion": _lion}[plan.optimizer]
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


def _adamw(parameters, **arguments) -> Optimizer:
    return torch.optim.AdamW(parameters, fused=True, **arguments)


def _adamw_8bit(device: torch.device, warn: Callable[[str], None]) -> Callable[..., Optimizer]:
    try:
        import bitsandbytes

        probe = torch.nn.Parameter(torch.zeros(4096, device=device))
        probe.grad = torch.ones_like(probe)
        bitsandbytes.optim.AdamW8bit([probe]).step()
    except Exception as error:  # a broken install raises anything, from ImportError to a missing C symbol
        return _stand_in(f"bitsandbytes does not work here ({type(error).__name__}: {error})", warn)
    return bitsandbytes.optim.AdamW8bit


def _stand_in(reason: str, warn: Callable[[str], None]) -> Callable[..., Optimizer]:
    def make(parameters, **arguments):
        warn(f"AdamW8bit is replaced by 32-bit AdamW: {reason}. The result is as good; optimizer states take 8 bytes per "
             f"trained weight where they would take 2.")
        return _adamw(parameters, **arguments)
    return make


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
