"""What a run's checkpoints belong to: a plan, by the settings that the result depends on."""

import hashlib
import json
from dataclasses import asdict

from crumb.profiles.errors import RequestError
from crumb.profiles.plan import Plan

CHANGEABLE = {
    "name", "created", "gradient_checkpointing", "cache_latents", "vram_gib", "skip_broken", "save_precision",
    "start_from", "save_every", "keep_checkpoints", "trackers", "judge_every", "sample_every", "sample_prompts",
    "sample_negative", "sample_steps", "sample_guidance", "images", "regularization", "base_model", "vae",
}
"""Settings that don't change what is learned, or whose content is compared by its own hash; so with subsets' folders."""


def plan_digest(plan: Plan) -> str:
    """Of the settings that the result depends on; the others may be changed between stop and resume."""
    settings = {name: value for name, value in asdict(plan).items() if name not in CHANGEABLE}
    settings["subsets"] = [{key: value for key, value in table.items() if key != "images"} for table in plan.subsets]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def belongs_to_another(what: str) -> RequestError:
    count = " The number of GPUs is part of it, as gradient_accumulation_steps x GPUs." if what == "plan.toml" else ""
    return RequestError(f"The {what} is not what this run's checkpoints were made with.{count} Undo the change to go on, or "
                        f"start a new run under another name.")
