"""What must fit together in a plan, beyond the range of a single value."""

import importlib.util
from datetime import datetime
from typing import TYPE_CHECKING, Any

from crumb.profiles.blocks import ATTENTION_BLOCKS, BLOCKS
from crumb.profiles.checks import nearest
from crumb.profiles.errors import RequestError
from crumb.profiles.optimizers import ADAPTIVE_OPTIMIZERS, OPTIMIZER_ARGS
from crumb.profiles.sample_prompts import sample_prompts

if TYPE_CHECKING:
    from crumb.profiles.plan import Plan

TRACKERS = ("tensorboard", "wandb", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab", "trackio")
"""accelerate's, by its names, which are those of their packages too."""


def check_together(plan: "Plan") -> None:
    """Rules beyond one value's range; the same ones for wizard, `crumb plan` and the engine."""
    try:
        datetime.fromisoformat(plan.created).timestamp()
    except (ValueError, OverflowError, OSError):
        raise RequestError(f"created is {plan.created!r}; it must be a date such as 2026-01-31T12:00:00+00:00.") from None
    _check_optimizer_args(plan)
    _check_blocks(plan)
    for name in plan.trackers:
        if name not in TRACKERS:
            raise RequestError(f"trackers names {name!r}; it must be of {', '.join(TRACKERS)}." + nearest(name, TRACKERS))
    if plan.resolution % 64:
        raise RequestError(f"resolution is {plan.resolution}; it must be a multiple of 64 (guide: CROP). "
                           f"Use {round(plan.resolution / 64) * 64}.")
    sample_prompts(plan)
    if ("conv" in plan.targets) != (plan.conv_rank > 0):
        raise RequestError(f"targets is {plan.targets!r} but conv_rank is {plan.conv_rank}. Set conv_rank above 0 together "
                           f"with targets = \"attention+ff+conv\", or neither.")
    if plan.optimizer in ADAPTIVE_OPTIMIZERS and plan.learning_rate < 0.1:
        raise RequestError(f"learning_rate is {plan.learning_rate:g} with {plan.optimizer}, which finds the rate itself and "
                           f"takes this number as a factor. Set learning_rate = 1.0 (guide: OPT-PRODIGY, OPT-DADAPT).")
    if plan.optimizer not in ADAPTIVE_OPTIMIZERS and plan.learning_rate > 0.1:
        raise RequestError(f"learning_rate is {plan.learning_rate:g} with {plan.optimizer}; above 0.1 training falls apart. "
                           f"1e-4 is the usual start (a rate of 1 is for Prodigy and DAdaptAdam).")
    if plan.timestep_min >= plan.timestep_max:
        raise RequestError(f"timestep_min is {plan.timestep_min} and timestep_max {plan.timestep_max}: no noise level is left "
                           f"to train. Set timestep_min below timestep_max; 0 and 1000 train all.")
    if plan.loss_weighting == "debiased" and plan.zero_terminal_snr and plan.prediction_type == "epsilon":
        raise RequestError("loss_weighting is debiased, which divides by the signal-to-noise ratio, and zero_terminal_snr "
                           "makes that 0 at the last noise level. Set loss_weighting = \"min_snr\" or \"none\".")
    if plan.device == "cpu" and plan.mixed_precision == "fp16":
        raise RequestError("mixed_precision is fp16 with device cpu, which has no fast fp16. Set mixed_precision = \"no\".")


def missing_packages(trackers: list[str]) -> list[str]:
    """Those of the trackers whose package is not installed here."""
    return [name for name in trackers if importlib.util.find_spec(name) is None]


BLOCK_BOUNDS = {"block_ranks": (1, 1024), "block_alphas": (0.1, 1024), "conv_block_ranks": (1, 1024),
                "conv_block_alphas": (0.1, 1024), "block_rates": (0, 10)}


def check_block_values(name: str, values: dict[str, Any]) -> None:
    """Known blocks (BLOCK-MAP) and values in range; else a RequestError."""
    low, high = BLOCK_BOUNDS[name]
    for block, value in values.items():
        if block not in BLOCKS:
            raise RequestError(f"{name} names the block {block!r}; SDXL's are {BLOCKS[0]} to {BLOCKS[8]}, MID, "
                               f"{BLOCKS[10]} to {BLOCKS[-1]}." + nearest(block, BLOCKS))
        wanted = int if name.endswith("ranks") else (int, float)
        if isinstance(value, bool) or not isinstance(value, wanted) or not low <= value <= high:
            kind = "whole number" if wanted is int else "number"
            raise RequestError(f"{name} gives {block} {value!r}; it must be a {kind} from {low} to {high}.")


def _check_blocks(plan: "Plan") -> None:
    """Settings of single blocks: each right by itself, of layers that learn, and something left to learn."""
    for name in BLOCK_BOUNDS:
        check_block_values(name, getattr(plan, name))
        if name.startswith("conv") and getattr(plan, name) and "conv" not in plan.targets:
            raise RequestError(f"{name} is given but targets is {plan.targets!r}, so that no 3x3 convolution learns. Set "
                               f"targets = \"attention+ff+conv\" and conv_rank above 0, or leave {name} out.")
    if all(plan.block_rates.get(block) == 0 for block in (BLOCKS if "conv" in plan.targets else ATTENTION_BLOCKS)):
        raise RequestError("block_rates is 0 for every block that could learn. Leave at least one above 0.")
    own_rate = plan.optimizer == "Adafactor" and plan.optimizer_args.get("relative_step", True)
    if plan.optimizer in ADAPTIVE_OPTIMIZERS or own_rate:
        _check_one_rate(plan)


def _check_one_rate(plan: "Plan") -> None:
    wrong = [f"block_rates gives {block} {rate:g}" for block, rate in plan.block_rates.items() if rate not in (0, 1)]
    wrong += [f"lora_plus_ratio is {plan.lora_plus_ratio:g}"] * (plan.lora_plus_ratio != 1)
    if wrong:
        raise RequestError(f"{wrong[0]}; {plan.optimizer} sets one rate for all that learns, so block_rates may only be 0 or 1 "
                           f"and lora_plus_ratio 1. AdamW8bit takes any.")
    for name in ("text_encoder_learning_rate", "text_encoder_2_learning_rate"):
        if getattr(plan, name) not in (0, plan.learning_rate):
            raise RequestError(f"{name} is {getattr(plan, name):g}; {plan.optimizer} finds one rate for all that learns, so "
                               f"it must be {plan.learning_rate:g} or 0.")


def _check_optimizer_args(plan: "Plan") -> None:
    known = OPTIMIZER_ARGS[plan.optimizer]
    for name, value in plan.optimizer_args.items():
        if name not in known:
            raise RequestError(f"optimizer_args has {name!r}, which {plan.optimizer} does not take; it takes "
                               f"{', '.join(known)}." + nearest(name, known))
        numbers = value if name == "betas" and isinstance(value, list) and len(value) == 2 else [value]
        if (name == "betas" and len(numbers) != 2) or not all(isinstance(number, int | float) for number in numbers):
            wanted = "two numbers, such as [0.9, 0.999]" if name == "betas" else "a number, true or false"
            raise RequestError(f"optimizer_args has {name} = {value!r}; it must be {wanted}.")
