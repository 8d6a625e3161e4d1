"""LoRA files by their headers alone: whether they are plain LoRAs, and whether a plan can start from one."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from crumb.profiles.errors import RequestError
from crumb.profiles.safetensors_header import read_header

if TYPE_CHECKING:
    from crumb.profiles.plan import Plan

LORA_KEY = re.compile(
    r"(?P<name>.+)\.(?P<kind>alpha|lora_down\.weight|lora_up\.weight|lora_A(\.default)?\.weight|lora_B(\.default)?\.weight"
    r"|lora\.down\.weight|lora\.up\.weight|lora_linear_layer\.down\.weight|lora_linear_layer\.up\.weight)")
"""A tensor of a plain LoRA in kohya's, diffusers' or PEFT's names."""

TEXT_ENCODER_MODULES = {
    "text_encoder_learning_rate": re.compile(r"lora_te1_|text_encoder\."),
    "text_encoder_2_learning_rate": re.compile(r"lora_te2_|text_encoder_2\."),
}
"""How the modules of a text encoder begin, by the setting without which it does not learn."""


def lora_modules(path: Path) -> set[str]:
    """Names of the modules that a LoRA file changes; RequestError where it is damaged or no plain LoRA."""
    header, _ = read_header(path)
    modules = set()
    for key in header:
        match = LORA_KEY.fullmatch(key)
        if not match:
            raise not_plain(path, key)
        modules.add(match["name"])
    if not modules:
        raise RequestError(f"{path} holds no tensors. Choose another file.")
    return modules


def not_plain(path: Path, key: str) -> RequestError:
    return RequestError(f"{path} holds {key}, which is no weight of a plain SDXL LoRA (LoHa, LoKr, DoRA, whole models and "
                        f"LoRAs of other models are not). Choose another file.")


def starting_findings(plan: "Plan") -> list[str]:
    """What of `start_from` the plan leaves out; RequestError where nothing of the file would be used."""
    if not plan.start_from:
        return []
    path = Path(plan.start_from).expanduser()
    modules, findings, num_idle = lora_modules(path), [], 0
    for setting, begins in TEXT_ENCODER_MODULES.items():
        num_of_encoder = sum(begins.match(name) is not None for name in modules)
        if num_of_encoder and not getattr(plan, setting):
            num_idle += num_of_encoder
            findings.append(f"{path.name} also changes a text encoder ({num_of_encoder} modules), which does not learn here: "
                            f"that part is left out of the new file. Set {setting} above 0 to keep it.")
    if num_idle == len(modules):
        raise RequestError(f"start_from: {path.name} changes text encoders only, and they don't learn in this plan. Set "
                           f"text_encoder_learning_rate and text_encoder_2_learning_rate above 0, or choose another file.")
    return findings
