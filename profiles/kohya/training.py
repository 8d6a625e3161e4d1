"""Length, saving, loss, masks and sample pictures in kohya's keys, read into plan settings.

Each function takes a whole file, since these keys change meaning with their neighbours.
"""

import json
import tomllib
from typing import Any

from crumb.profiles.kohya.values import KohyaFile, Later, Untaken, number, prompts_of, truth, whole


def prediction(file: KohyaFile) -> dict[str, Any]:
    return {"prediction_type": "v_prediction" if file.is_on("v_parameterization") else "epsilon"}


def quantize_base(file: KohyaFile) -> dict[str, Any]:
    if not (file.is_on("fp8_base") or file.is_on("fp8_base_unet")):
        return {"quantize_base": "no"}
    file.remarks.append("int8 in place of fp8, as small")
    return {"quantize_base": "int8"}


def length(file: KohyaFile) -> dict[str, Any]:
    """Steps or epochs. sd-scripts: max_train_epochs before max_train_steps; the GUI counts `epoch` where neither is set."""
    given = {key: whole(file.get(key, 0)) for key in ("max_train_epochs", "max_train_steps", "epoch")}
    if not file.gui:
        given.pop("epoch")
    set_ones = [key for key, value in given.items() if value > 0]
    if not set_ones:
        raise Untaken("it sets no length, so the guide's is taken")
    if len(set_ones) > 1:
        file.remarks.append(f"{set_ones[0]} counts")
    return {"steps" if set_ones[0] == "max_train_steps" else "epochs": given[set_ones[0]]}


def repeats(file: KohyaFile) -> dict[str, Any]:
    key = next((key for key in ("num_repeats", "dataset_repeats") if key in file), None)
    if key:
        return {"repeats": whole(file[key])}
    file.remarks.append("those of folders named N_name, as in sd-scripts")
    return {"repeats": 1}


def save_every(file: KohyaFile) -> dict[str, Any]:
    steps = whole(file.get("save_every_n_steps", 0))
    return {"save_every": steps if steps > 0 else _epochs_in_steps(file, "save_every_n_epochs")}


def sample_every(file: KohyaFile) -> dict[str, Any]:
    """Epochs win over steps there."""
    return {"sample_every": _epochs_in_steps(file, "sample_every_n_epochs")
            or max(0, whole(file.get("sample_every_n_steps", 0)))}


def _epochs_in_steps(file: KohyaFile, key: str) -> int | Later:
    epochs = whole(file.get(key, 0))
    if epochs <= 0:
        return 0
    file.remarks.append(f"{epochs} epoch{'s' * (epochs > 1)} in steps")
    return Later(lambda length: max(1, min(length.steps, round(epochs * length.steps_per_epoch))))


def keep_checkpoints(file: KohyaFile) -> dict[str, Any]:
    """sd-scripts counts epochs, or the steps within which checkpoints stay; unset means all."""
    epochs, every = whole(file.get("save_last_n_epochs", 0)), whole(file.get("save_every_n_steps", 0))
    if epochs > 0:
        return {"keep_checkpoints": epochs}
    if every > 0 and "save_last_n_steps" in file:
        return {"keep_checkpoints": whole(file["save_last_n_steps"]) // every + 1}
    raise Untaken("sd-scripts keeps every checkpoint then; crumb the newest three, and the best")


def weighting(file: KohyaFile) -> dict[str, Any]:
    gamma, debiased = number(file.get("min_snr_gamma", 0)), file.is_on("debiased_estimation_loss")
    if gamma > 0:
        if debiased:
            file.remarks.append("min_snr_gamma alone: crumb weighs the noise levels one way at a time")
        return {"loss_weighting": "min_snr", "min_snr_gamma": gamma}
    return {"loss_weighting": "debiased" if debiased else "none"}


def loss_type(file: KohyaFile) -> dict[str, Any]:
    name = str(file["loss_type"]).lower()
    if name in ("l1", "mae", "pseudo_huber"):
        file.remarks.append(f"the nearest: crumb has no {name}")
        return {"loss_type": "smooth_l1" if name != "pseudo_huber" else "huber"}
    return {"loss_type": name}


def held_out(file: KohyaFile) -> dict[str, Any]:
    """A share of the pictures there, a number of them here."""
    share = number(file["validation_split"])
    return {"held_out_pictures": Later(lambda length: round(share * length.num_pictures)) if share else 0}


def start_from(file: KohyaFile) -> dict[str, Any]:
    return {"start_from": _found(file, "network_weights", "there is no such file here; name one with --set start_from=FILE")}


def regularization(file: KohyaFile) -> dict[str, Any]:
    return {"regularization": _found(file, "reg_data_dir", "there is no such folder here; name one with --set "
                                                           "regularization=DIR")}


def _found(file: KohyaFile, key: str, mend: str) -> str:
    """Where the path under a key lies on this machine; empty where the key is."""
    named = str(file[key])
    found = file.find(named) if named else None
    if named and found is None:
        raise Untaken(mend)
    return str(found.absolute()) if found else ""


def further_subsets(file: KohyaFile) -> dict[str, Any]:
    """The folders beyond the first, each with what a subset of crumb's may give anew."""
    tables = []
    for subset in file["datasets.subsets"]:
        found = file.find(str(subset.get("image_dir", "")))
        if found is None:
            raise Untaken(f"there is no folder {subset.get('image_dir')} here")
        table: dict[str, Any] = {"images": str(found.absolute()), "repeats": whole(subset.get("num_repeats", 1))}
        if "class_tokens" in subset:
            table["class_word"] = str(subset["class_tokens"])
        if "flip_aug" in subset:
            table["flip"] = truth(subset["flip_aug"])
        if truth(subset.get("is_reg", False)):
            table["regularization"] = True
        tables.append(table)
    return {"subsets": tables}


def mask(file: KohyaFile) -> dict[str, Any]:
    if file.is_on("masked_loss") or "conditioning_data_dir" in file:
        file.remarks.append("crumb looks for NAME-masklabel.png beside each picture: move the masks there")
        return {"masked_loss": "files"}
    return {"masked_loss": "alpha" if file.is_on("alpha_mask") else "off"}


def trackers(file: KohyaFile) -> dict[str, Any]:
    named = str(file["log_with"]).lower()
    return {"trackers": ["tensorboard", "wandb"] if named == "all" else [named]}


def sample_prompts(file: KohyaFile) -> dict[str, Any]:
    """From the text itself (GUI), or a .txt, .toml or .json file; one number of steps and one scale for all."""
    prompts = _read_prompts(file, str(file["sample_prompts"]))
    if not prompts:
        raise Untaken("it holds no prompt")
    found: dict[str, Any] = {"sample_prompts": [str(prompt.get("prompt", "")) for prompt in prompts]}
    for key, name, read in (("sample_steps", "sample_steps", whole), ("scale", "sample_guidance", number),
                            ("negative_prompt", "sample_negative", str)):
        given = [prompt[key] for prompt in prompts if key in prompt]
        if given:
            found[name] = read(given[0])
        if any(value != given[0] for value in given):
            file.remarks.append(f"{name} of the first prompt for all")
    return found


def _read_prompts(file: KohyaFile, value: str) -> list[dict[str, Any]]:
    if file.gui:
        return prompts_of(value)
    path = file.find(value)
    if path is None or not path.is_file():
        raise Untaken("there is no such file here")
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".txt":
            return prompts_of(text)
        if path.suffix == ".json":
            return [one for one in json.loads(text) if isinstance(one, dict)]
        table = tomllib.loads(text)["prompt"]
        general = {key: item for key, item in table.items() if key != "subset"}
        return [general | one for one in table["subset"]]
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Untaken("that file can't be read as prompts") from None
