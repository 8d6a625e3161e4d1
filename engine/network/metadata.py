"""The LoRA file's metadata: what A1111, Forge, kohya's tools and Civitai read, all strings, no local paths.

Nothing here depends on the clock: dates come from the plan, so that the same plan gives the same file.
"""

import json
import re
from collections import Counter
from datetime import datetime
from pathlib import Path

from crumb.profiles.buckets import Crop
from crumb.profiles.dataset import Picture
from crumb.profiles.plan import Plan


def lora_metadata(plan: Plan, base_sha256: str, pictures: list[Picture], crops: list[Crop], captions: list[str],
                  step: int) -> dict[str, str]:
    """All keys of a LoRA file but its hash. `step` is the last finished one."""
    created = datetime.fromisoformat(plan.created)
    num_views = sum(picture.repeats * plan.repeats for picture in pictures)
    epoch = step * plan.batch_size * plan.gradient_accumulation_steps / max(1, num_views)
    fields = {
        **_kohya_network(plan),
        **_kohya_data(plan, pictures, crops, captions),
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
    arguments = {"conv_dim": str(plan.conv_rank), "conv_alpha": str(plan.conv_alpha)} if plan.conv_rank else {}
    return {
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_v2": False,
        "ss_network_module": "networks.lora",
        "ss_network_dim": plan.rank,
        "ss_network_alpha": plan.alpha,
        "ss_network_args": arguments,
        "ss_learning_rate": plan.learning_rate,
        "ss_unet_lr": plan.learning_rate,
        "ss_text_encoder_lr": 0.0,
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
        "ss_clip_skip": None,
        "ss_cache_latents": True,
    }


def _kohya_data(plan: Plan, pictures: list[Picture], crops: list[Crop], captions: list[str]) -> dict:
    sizes = Counter((crop.width, crop.height) for crop in crops)
    folders: dict[str, list[tuple[Picture, str]]] = {}
    for picture, caption in zip(pictures, captions):
        name = picture.path.parent.name if picture.repeats > 1 else Path(plan.images).name
        folders.setdefault(f"{picture.repeats * plan.repeats}_{re.sub(r'^[0-9]+_', '', name)}", []).append((picture, caption))
    buckets = {str(index): {"resolution": list(size), "count": count}
               for index, (size, count) in enumerate(sorted(sizes.items()))}
    errors = [abs(p.width / p.height - crop.width / crop.height) for p, crop in zip(pictures, crops)]
    tags = {folder: dict(Counter(tag.strip() for _, caption in members for tag in caption.split(",") if tag.strip()))
            for folder, members in folders.items()}
    return {
        "ss_num_train_images": sum(picture.repeats * plan.repeats for picture in pictures),
        "ss_num_reg_images": 0,
        "ss_batch_size_per_device": plan.batch_size,
        "ss_total_batch_size": plan.batch_size * plan.gradient_accumulation_steps,
        "ss_resolution": f"({plan.resolution}, {plan.resolution})",
        "ss_enable_bucket": plan.buckets,
        "ss_bucket_info": {"buckets": buckets, "mean_img_ar_error": sum(errors) / len(errors)},
        "ss_dataset_dirs": {name: {"n_repeats": members[0][0].repeats * plan.repeats, "img_count": len(members)}
                            for name, members in folders.items()},
        "ss_tag_frequency": tags,
        "ss_reg_dataset_dirs": {},
    }
