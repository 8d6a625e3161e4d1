"""The LoRA file's metadata: what A1111, Forge, kohya's tools and Civitai read, all strings, no local paths.

Nothing here depends on the clock: dates come from the plan, so that the same plan gives the same file.
"""

import json
import re
from collections import Counter
from datetime import datetime
from pathlib import Path

from crumb.profiles.buckets import Crop
from crumb.profiles.kohya.exporting import network_args
from crumb.profiles.kohya.writing import text_encoder_rates
from crumb.profiles.pictures import Picture
from crumb.profiles.plan import Plan
from crumb.profiles.subsets import Subset, effective_subsets


def lora_metadata(plan: Plan, base_sha256: str, pictures: list[Picture], crops: list[Crop], captions: list[str],
                  step: int) -> dict[str, str]:
    """All keys of a LoRA file but its hash. `step` is the last finished one; `pictures` are all but the held-out ones."""
    created = datetime.fromisoformat(plan.created)
    data = _kohya_data(plan, pictures, crops, captions)
    # As many views of regularization pictures, however many there are.
    num_views = data["ss_num_train_images"] * (2 if data["ss_num_reg_images"] else 1)
    epoch = step * plan.batch_size * plan.gradient_accumulation_steps / max(1, num_views)
    fields = {
        **_kohya_network(plan),
        **data,
        "ss_output_name": plan.name,
        "ss_sd_model_name": Path(plan.base_model).name,
        "ss_new_sd_model_hash": base_sha256,
        "ss_training_started_at": str(created.timestamp()),
        "ss_epoch": round(epoch),
        "ss_steps": step,
        "ss_max_train_steps": plan.steps,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": plan.name,
        "modelspec.resolution": f"{plan.resolution}x{plan.resolution}",
        "modelspec.date": plan.created,
        "modelspec.prediction_type": "epsilon" if plan.prediction_type == "epsilon" else "v",
        "modelspec.trigger_phrase": plan.trigger or None,
    }
    if plan.vae:
        fields["ss_vae_name"] = Path(plan.vae).name
    return {key: value if isinstance(value, str) else json.dumps(value) if isinstance(value, dict) else str(value)
            for key, value in fields.items() if value is not None}


def sidecar(plan: Plan) -> dict:
    """NAME.json as A1111, Forge and InvokeAI read it."""
    return {"activation text": plan.trigger, "sd version": "SDXL", "preferred weight": 1.0,
            "description": f"LoRA for {Path(plan.base_model).stem}, rank {plan.rank}, {plan.steps} steps"}


def _kohya_network(plan: Plan) -> dict:
    text_rates = text_encoder_rates(plan).get("text_encoder_lr", [0.0])
    return {
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_v2": False,
        "ss_network_module": "networks.lora",
        "ss_network_dim": plan.rank,
        "ss_network_alpha": plan.alpha,
        "ss_network_args": network_args(plan),
        "ss_learning_rate": plan.learning_rate,
        "ss_unet_lr": plan.learning_rate,
        "ss_text_encoder_lr": text_rates if len(set(text_rates)) > 1 else text_rates[0],
        "ss_optimizer": plan.optimizer + "".join(f" {key}={value}" for key, value in plan.optimizer_args.items()),
        "ss_lr_scheduler": plan.scheduler,
        "ss_lr_warmup_steps": round(plan.steps * plan.warmup_ratio) if plan.scheduler == "constant_with_warmup" else 0,
        "ss_mixed_precision": plan.mixed_precision,
        "ss_gradient_checkpointing": plan.gradient_checkpointing,
        "ss_gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "ss_max_grad_norm": plan.max_grad_norm,
        "ss_noise_offset": plan.noise_offset or None,
        "ss_multires_noise_iterations": plan.multires_noise_iterations or None,
        "ss_multires_noise_discount": plan.multires_noise_discount if plan.multires_noise_iterations else None,
        "ss_ip_noise_gamma": plan.input_perturbation or None,
        "ss_min_snr_gamma": plan.min_snr_gamma if plan.loss_weighting == "min_snr" else None,
        "ss_debiased_estimation": plan.loss_weighting == "debiased",
        "ss_zero_terminal_snr": plan.zero_terminal_snr,
        "ss_loss_type": plan.loss_type,
        "ss_huber_schedule": plan.huber_schedule if plan.loss_type != "l2" else None,
        "ss_huber_c": plan.huber_c if plan.loss_type != "l2" else None,
        "ss_seed": plan.seed,
        "ss_clip_skip": plan.clip_skip if plan.clip_skip != 2 else None,
        "ss_network_dropout": plan.network_dropout or None,
        "ss_scale_weight_norms": plan.max_norm or None,
        "ss_max_token_length": plan.max_token_length if plan.max_token_length > 75 else None,
        "ss_keep_tokens": plan.keep_tokens if plan.shuffle_captions or plan.tag_dropout else None,
        "ss_shuffle_caption": plan.shuffle_captions,
        "ss_caption_dropout_rate": plan.caption_dropout,
        "ss_caption_tag_dropout_rate": plan.tag_dropout,
        "ss_cache_latents": True,
    }


def _kohya_data(plan: Plan, pictures: list[Picture], crops: list[Crop], captions: list[str]) -> dict:
    subsets = effective_subsets(plan)
    sizes = Counter((crop.width, crop.height) for crop in crops)
    buckets = {str(index): {"resolution": list(size), "count": count}
               for index, (size, count) in enumerate(sorted(sizes.items()))}
    errors = [abs(p.width / p.height - crop.width / crop.height) for p, crop in zip(pictures, crops)]
    taught, regularizing = ([(picture, caption) for picture, caption in zip(pictures, captions)
                             if subsets[picture.subset].regularization == wanted] for wanted in (False, True))
    return {
        "ss_num_train_images": sum(_repeats(picture, subsets) for picture, _ in taught),
        "ss_num_reg_images": sum(_repeats(picture, subsets) for picture, _ in regularizing),
        "ss_prior_loss_weight": plan.prior_loss_weight,
        "ss_flip_aug": any(subset.flip for subset in subsets),
        "ss_batch_size_per_device": plan.batch_size,
        "ss_total_batch_size": plan.batch_size * plan.gradient_accumulation_steps,
        "ss_resolution": f"({plan.resolution}, {plan.resolution})",
        "ss_enable_bucket": plan.buckets,
        "ss_bucket_info": {"buckets": buckets, "mean_img_ar_error": sum(errors) / len(errors)},
        "ss_dataset_dirs": _folders(taught, subsets),
        "ss_reg_dataset_dirs": _folders(regularizing, subsets),
        "ss_tag_frequency": {
            folder: dict(Counter(tag.strip() for picture, caption in taught if _folder_name(picture, subsets) == folder
                                 for tag in caption.split(",") if tag.strip()))
            for folder in _folders(taught, subsets)},
    }


def _folders(members: list[tuple[Picture, str]], subsets: list[Subset]) -> dict[str, dict[str, int]]:
    folders: dict[str, dict[str, int]] = {}
    for picture, _ in members:
        folder = folders.setdefault(_folder_name(picture, subsets), {"n_repeats": _repeats(picture, subsets), "img_count": 0})
        folder["img_count"] += 1
    return folders


def _folder_name(picture: Picture, subsets: list[Subset]) -> str:
    """`10_cat`, as kohya's tools expect: the repeats, then the folder's own name."""
    name = picture.path.parent.name if picture.repeats > 1 else Path(subsets[picture.subset].images).name
    return f"{_repeats(picture, subsets)}_{re.sub(r'^[0-9]+_', '', name)}"


def _repeats(picture: Picture, subsets: list[Subset]) -> int:
    return picture.repeats * subsets[picture.subset].repeats
