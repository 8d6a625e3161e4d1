"""A crumb plan as the settings of sd-scripts' sdxl_train_network.py: what it can hold, and a list of what it can't."""

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomlkit

from crumb.profiles.kohya.folders import picture_folders
from crumb.profiles.kohya.table import TABLE, Left, Row
from crumb.profiles.kohya.values import Untaken, is_neutral
from crumb.profiles.plan import Plan, plan_fields

SECTIONS = ("model", "network", "optimizer", "training", "noise", "loss", "output")

DATASET_KEYS = {"train_batch_size": "batch_size"}
"""Dataset files have names of their own."""

FIXED = {
    "training": {"cache_latents": True, "cache_latents_to_disk": True, "sdpa": True, "no_half_vae": True},
    "output": {"output_dir": "output", "save_model_as": "safetensors"},
}
"""What crumb does unasked, in sd-scripts' words."""


@dataclass
class Export:
    """The files by the ending that their name gets, and what could not be written into them."""

    settings: dict[str, Any] = field(default_factory=dict)
    datasets: dict[str, Any] = field(default_factory=dict)
    prompts: dict[str, Any] = field(default_factory=dict)
    missing: list[Left] = field(default_factory=list)
    ignored: list[Left] = field(default_factory=list)

    def files(self, out: Path) -> dict[Path, str]:
        """Path and text of each file. sd-scripts wants the folders and the prompts in files of their own."""
        datasets, prompts = (out.absolute().with_name(f"{out.stem}-{name}.toml") for name in ("dataset", "prompts"))
        settings = {**self.settings, "data": {"dataset_config": str(datasets)}}
        texts = {datasets: _toml(self.datasets)}
        if self.prompts:
            settings["output"] = {**settings["output"], "sample_prompts": str(prompts)}
            texts[prompts] = _toml(self.prompts)
        start = f"accelerate launch sdxl_train_network.py --config_file {shlex.quote(str(out))}"
        return {out: _toml(settings, f"A crumb plan for sd-scripts. Start it with: {start}"), **texts}


def export_plan(plan: Plan) -> Export:
    """The plan's paths must be absolute, since sd-scripts takes others from where it is started."""
    result = Export()
    written: dict[str, dict[str, Any]] = {}
    for row in TABLE:
        for key, value in _written(result, row, plan).items():
            if value != "":
                written.setdefault(row.place, {})[key] = value
    arguments = [f"{key}={value}" for key, value in written.get("network_args", {}).items()]
    if arguments:
        written["network"]["network_args"] = arguments
    for name, values in FIXED.items():
        written[name] = {**written.get(name, {}), **values}
    result.settings = {name: written[name] for name in SECTIONS}
    side = plan.resolution
    dataset = {DATASET_KEYS.get(key, key): value for key, value in written["dataset"].items()}
    dataset |= {"min_bucket_reso": side // 2, "max_bucket_reso": side * 2, "bucket_reso_steps": 64}
    subsets = _subsets(result, plan, {**written["subset"], "caption_extension": ".txt"})
    result.datasets = {"datasets": [{**dataset, "subsets": subsets}]}
    result.prompts = _prompts(plan)
    listed = {name for row in TABLE for name in row.crumb}
    result.missing += [Left(name, getattr(plan, name), "sd-scripts has no such setting")
                       for name in plan_fields() if name not in listed]
    return result


def network_args(plan: Plan) -> dict[str, str]:
    """What of it sd-scripts takes as network_args, for a file's metadata: what is switched on, as texts."""
    return {key: str(value) for row in TABLE if row.place == "network_args"
            for key, value in _written(Export(), row, plan).items() if not is_neutral(value, row.neutral)}


def _written(result: Export, row: Row, plan: Plan) -> dict[str, Any]:
    """The row's keys and values, or an entry in one of the two lists."""
    names = [name for name in row.crumb if name in plan_fields()]
    if not names:
        return {}
    try:
        if row.to_kohya:
            return row.to_kohya(plan)
        if row.kohya:  # written apart: folders and prompts
            return {}
        raise Untaken(row.reason)
    except Untaken as error:
        for name in names:
            value = getattr(plan, name)
            unchanged = value == plan_fields()[name].default if row.kohya else is_neutral(value, row.neutral)
            (result.ignored if row.ignored or unchanged else result.missing).append(Left(name, value, str(error)))
    return {}


def _subsets(result: Export, plan: Plan, common: dict[str, Any]) -> list[dict[str, Any]]:
    """One table per folder that holds pictures: sd-scripts does not look below a folder that a dataset file names."""
    common.pop("train_data_dir", None)
    found = _folders(plan.images, plan.repeats, common)
    for table in getattr(plan, "subsets", []):
        own = {"class_tokens": f"{table.get('trigger', plan.trigger)} {table.get('class_word', plan.class_word)}".strip(),
               "flip_aug": table.get("flip", getattr(plan, "flip", False))}
        if table.get("regularization"):
            own |= {"is_reg": True, "class_tokens": table.get("class_word", plan.class_word)}
        left = {key: table[key] for key in ("masked_loss", "loss_weight") if key in table}
        if left:
            result.missing.append(Left("subsets", left, f"sd-scripts has one for all folders, also for {table['images']}"))
        repeats = table.get("repeats", 1 if table.get("regularization") else plan.repeats)
        found += _folders(table["images"], repeats, {**common, **own})
    if isinstance(regularization := getattr(plan, "regularization", ""), str) and regularization:
        found += _folders(regularization, 1, {**common, "class_tokens": plan.class_word, "is_reg": True})
    return found


def _folders(folder: str, repeats: int, settings: dict[str, Any]) -> list[dict[str, Any]]:
    folders = picture_folders(Path(folder).expanduser()) or {Path(folder): 1}
    return [{"image_dir": str(path), **settings, "num_repeats": repeats * factor} for path, factor in folders.items()]


def _prompts(plan: Plan) -> dict[str, Any]:
    if not plan.sample_prompts:
        return {}
    common = {"width": plan.resolution, "height": plan.resolution, "sample_steps": plan.sample_steps,
              "scale": plan.sample_guidance}
    if getattr(plan, "sample_negative", ""):
        common["negative_prompt"] = plan.sample_negative
    subsets = [{"prompt": prompt, "seed": plan.seed + index} for index, prompt in enumerate(plan.sample_prompts)]
    return {"prompt": {**common, "subset": subsets}}


def _toml(content: dict[str, Any], comment: str = "") -> str:
    document = tomlkit.document()
    if comment:
        document.add(tomlkit.comment(comment))
    document.update(content)
    return tomlkit.dumps(document)
