"""A plan's settings as kohya's keys, where one does not simply hold the other's value."""

from typing import Any

from crumb.profiles.kohya.values import (
    BLOCK_POSITIONS,
    DOWN_WEIGHTS,
    MID_WEIGHTS,
    UP_WEIGHTS,
    Untaken,
    argument_text,
    block_list,
)
from crumb.profiles.plan import Plan


def prediction(plan: Plan) -> dict[str, Any]:
    return {"v_parameterization": plan.prediction_type == "v_prediction"}


def class_tokens(plan: Plan) -> dict[str, Any]:
    """What is shown where a picture has no caption: in crumb the trigger and the class word."""
    return {"class_tokens": f"{plan.trigger} {plan.class_word}".strip()}


def mask(plan: Plan) -> dict[str, Any]:
    if plan.masked_loss == "files":
        raise Untaken("sd-scripts wants masks in a folder of their own: name it as conditioning_data_dir and set masked_loss")
    return {"alpha_mask": plan.masked_loss == "alpha"}


def held_out(plan: Plan) -> dict[str, Any]:
    if plan.held_out_pictures:
        raise Untaken("sd-scripts takes a share of the pictures: validation_split")
    return {"validation_split": 0.0}


def above_zero(plan: Plan, name: str, key: str) -> dict[str, Any]:
    """Steps between two events; sd-scripts divides by them, so that 0 must be left out."""
    return {key: getattr(plan, name)} if getattr(plan, name) else {}


def network_module(plan: Plan) -> dict[str, Any]:
    if plan.method != "lora":
        raise Untaken("sd-scripts trains it through LyCORIS: write network_module and network_args by hand")
    return {"network_module": "networks.lora"}


def quantize_base(plan: Plan) -> dict[str, Any]:
    if plan.quantize_base != "no":
        raise Untaken("sd-scripts' own small base is fp8: add fp8_base_unet, with mixed_precision fp16 or bf16")
    return {}


def convolutions(plan: Plan) -> dict[str, Any]:
    if plan.targets == "attention":
        raise Untaken("sd-scripts' LoRA always trains the feed-forward layers too")
    return {"conv_dim": plan.conv_rank} if plan.conv_rank else {}


def block_ranks(plan: Plan) -> dict[str, Any]:
    return _block_dims(plan) if plan.block_ranks else {}


def block_alphas(plan: Plan) -> dict[str, Any]:
    """sd-scripts reads this list and the convolutions' only beside block_dims or block weights."""
    if not plan.block_alphas:
        return {}
    return _block_dims(plan) | {"block_alphas": block_list(plan.block_alphas, BLOCK_POSITIONS, plan.alpha)}


def conv_block_ranks(plan: Plan) -> dict[str, Any]:
    return _block_dims(plan) | _conv_block_dims(plan) if plan.conv_block_ranks else {}


def conv_block_alphas(plan: Plan) -> dict[str, Any]:
    """Read only beside conv_block_dims."""
    if not plan.conv_block_alphas:
        return {}
    return _block_dims(plan) | _conv_block_dims(plan) | {
        "conv_block_alphas": block_list(plan.conv_block_alphas, BLOCK_POSITIONS, plan.conv_alpha)}


def _block_dims(plan: Plan) -> dict[str, Any]:
    return {"block_dims": block_list(plan.block_ranks, BLOCK_POSITIONS, plan.rank)}


def _conv_block_dims(plan: Plan) -> dict[str, Any]:
    return {"conv_block_dims": block_list(plan.conv_block_ranks, BLOCK_POSITIONS, plan.conv_rank)}


def block_rates(plan: Plan) -> dict[str, Any]:
    if not plan.block_rates:
        return {}
    return {key: block_list(plan.block_rates, positions, 1.0) for key, positions in
            (("down_lr_weight", DOWN_WEIGHTS), ("mid_lr_weight", MID_WEIGHTS), ("up_lr_weight", UP_WEIGHTS))}


def lora_plus(plan: Plan) -> dict[str, Any]:
    return {"loraplus_lr_ratio": plan.lora_plus_ratio} if plan.lora_plus_ratio != 1 else {}


def optimizer(plan: Plan) -> dict[str, Any]:
    if plan.optimizer == "Prodigy8bit":
        raise Untaken("sd-scripts has Prodigy with 32-bit states only: optimizer_type = \"Prodigy\"")
    return {"optimizer_type": plan.optimizer}


def optimizer_args(plan: Plan) -> dict[str, Any]:
    return {"optimizer_args": [f"{name}={argument_text(value)}" for name, value in plan.optimizer_args.items()]}


def learning_rate(plan: Plan) -> dict[str, Any]:
    return {"learning_rate": plan.learning_rate, "unet_lr": plan.learning_rate}


def text_encoder_rates(plan: Plan) -> dict[str, Any]:
    """With rates of 0, or a stop before the first step, the U-Net alone: left out, both would learn at learning_rate."""
    rates = [plan.text_encoder_learning_rate, plan.text_encoder_2_learning_rate]
    return {"text_encoder_lr": rates} if plan.num_text_steps else {"network_train_unet_only": True}


def text_encoder_stop(plan: Plan) -> dict[str, Any]:
    if 0 < plan.num_text_steps < plan.steps:
        raise Untaken("sd-scripts trains a LoRA's text encoders to the end")
    return {}


def warmup(plan: Plan) -> dict[str, Any]:
    """As a share; with `constant` sd-scripts stops at any warm-up, and crumb has none."""
    return {} if plan.scheduler == "constant" else {"lr_warmup_steps": plan.warmup_ratio}


def weighting(plan: Plan) -> dict[str, Any]:
    return {"min_snr_gamma": plan.min_snr_gamma if plan.loss_weighting == "min_snr" else 0.0,
            "debiased_estimation_loss": plan.loss_weighting == "debiased"}


def keep_checkpoints(plan: Plan) -> dict[str, Any]:
    """sd-scripts keeps those of the last so many steps."""
    return {"save_last_n_steps": (plan.keep_checkpoints - 1) * plan.save_every} if plan.save_every else {}


def trackers(plan: Plan) -> dict[str, Any]:
    if not plan.trackers:
        return {}
    return {"log_with": "all" if len(plan.trackers) > 1 else plan.trackers[0]}
