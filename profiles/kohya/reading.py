"""A settings file of sd-scripts (TOML) or of the kohya_ss GUI (JSON), read as far as it is one of an SDXL LoRA."""

import json
import tomllib
from pathlib import Path
from typing import Any

from crumb.profiles.errors import RequestError
from crumb.profiles.kohya.folders import read_datasets
from crumb.profiles.kohya.table import FOREIGN_KEYS, KNOWN_KEYS
from crumb.profiles.kohya.values import KohyaFile, Untaken, pairs, split_words, truth, whole

MAX_BYTES = 4_000_000

GUI_NAMES = {
    "max_resolution": "resolution", "optimizer": "optimizer_type", "lora_network_weights": "network_weights",
    "stop_text_encoder_training": "stop_text_encoder_training_pct", "LyCORIS_preset": "preset",
    "sdxl_cache_text_encoder_outputs": "cache_text_encoder_outputs", "sdxl_no_half_vae": "no_half_vae",
    "conv_dims": "conv_block_dims", "conv_alphas": "conv_block_alphas",
}
"""The GUI's names of sd-scripts' keys."""

GUI_TYPES = {
    "standard": ("networks.lora", ""), "kohya locon": ("networks.lora", ""), "lora-fa": ("networks.lora_fa", ""),
    "kohya dylora": ("networks.dylora", ""), "locon": ("lycoris.kohya", "locon"),
    "lycoris/native fine-tuning": ("lycoris.kohya", "full"),
}
LYCORIS_ONLY = ("preset", "factor", "use_cp", "use_tucker", "use_scalar", "rank_dropout_scale", "constrain", "rescaled",
                "train_norm", "decompose_both", "train_on_input", "bypass_mode", "dora_wd")
BLOCKWISE = ("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas", "down_lr_weight", "mid_lr_weight",
             "up_lr_weight", "block_lr_zero_threshold")
OTHER_FAMILIES = ("flux", "sd3", "lumina", "hunyuan", "anima", "chroma", "qwen", "wan", "zimage", "leco")
TRAINS = "crumb trains LoRA and LoCon for SDXL"


def read_settings(path: Path, dataset_config: Path | None = None) -> KohyaFile:
    """RequestError for what is no settings file, or one for another kind of model."""
    document = _parse(path)
    datasets = {key: document.pop(key) for key in ("general", "datasets") if key in document}
    if "datasets" not in datasets and isinstance(datasets.get("general"), dict):
        document |= datasets.pop("general")  # an ordinary section then
    flat: dict[str, Any] = {}
    for key, value in document.items():  # sections mean nothing to sd-scripts
        flat |= value if isinstance(value, dict) and key != "optimizer_args" else {key: value}
    gui = any(key in flat for key in ("LoRA_type", "max_resolution", "lr_warmup", "additional_parameters"))
    file = KohyaFile(path, gui)
    _take_all(file, flat)
    try:
        _check_kind(file)
        if gui:
            _as_the_gui_does(file)
    except Untaken as error:
        raise RequestError(f"{path}: {error}, where the GUI writes another kind of value. Mend it there.") from None
    _add_datasets(file, datasets, dataset_config)
    _check_known(file)
    return file


def _parse(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise RequestError(f"There is no file {path}. Name an sd-scripts .toml or a kohya_ss .json preset.") from None
    except OSError as error:
        raise RequestError(f"{path} can't be read ({error.strerror}). Name an sd-scripts .toml or a kohya_ss .json.") from None
    wanted = "Name an sd-scripts settings file (.toml) or a kohya_ss preset (.json)."
    if len(content) > MAX_BYTES:
        raise RequestError(f"{path} is too large for a settings file. {wanted}")
    try:
        text = content.decode("utf-8-sig")
        if "\0" in text:
            raise ValueError
    except ValueError:
        raise RequestError(f"{path} is no text. {wanted}") from None
    as_json = path.suffix.lower() == ".json" or (path.suffix.lower() != ".toml" and text.lstrip()[:1] == "{")
    try:
        document = json.loads(text) if as_json else tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path} is no valid {'JSON' if as_json else 'TOML'} ({error}). {wanted}") from None
    if not isinstance(document, dict):
        raise RequestError(f"{path} holds a {type(document).__name__}, where settings are a table of keys. {wanted}")
    if "plan_version" in document:
        raise RequestError(f"{path} is a crumb plan already: train it with `crumb train {path}`.")
    return document


def _take_all(file: KohyaFile, flat: dict[str, Any]) -> None:
    """Keys under sd-scripts' names, with what is written inside other values (extra options, network_args) beside them."""
    extra = flat.pop("additional_parameters", "") if file.gui else ""
    flat.pop("datasets.subsets", None)  # what read_datasets alone may say
    for key, value in flat.items():
        _take(file, key, value)
    for key, value in _options(str(extra or "")).items():
        _take(file, key, value, ("additional_parameters", f"--{key}" if value is True else f"--{key} {value}"))
    for key, value in pairs(file.settings.pop("network_args", [])).items():
        _take(file, key, value, (f"network_args {key}", value))
    if file.settings.pop("use_wandb", False) is True and "log_with" not in file:
        _take(file, "log_with", "wandb", ("use_wandb", True))


def _take(file: KohyaFile, key: str, value: Any, source: tuple[str, Any] | None = None) -> None:
    if value is None or (isinstance(value, str) and not value.strip()) or value == []:
        return
    name = GUI_NAMES.get(key, key) if file.gui else key
    file.settings[name] = value.strip() if isinstance(value, str) else value
    if source or name != key:
        file.sources[name] = source or (key, value)
    else:
        file.sources.pop(name, None)


def _options(text: str) -> dict[str, Any]:
    """`--a=1 --b --c x y` as a shell gives them to sd-scripts."""
    found: dict[str, Any] = {}
    key = ""
    for word in split_words(text):
        if word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            found[key] = value if equals else True
        elif key:
            found[key] = word if found[key] is True else [*(found[key] if isinstance(found[key], list) else [found[key]]), word]
    return found


def _check_kind(file: KohyaFile) -> None:
    """RequestError for settings of another model family, or of no LoRA."""
    if file.is_on("v2"):
        raise RequestError(f"{file.path} is for Stable Diffusion 2 (v2); {TRAINS}.")
    kind = str(file.get("LoRA_type", file.get("network_module", ""))).lower()
    family = next((key for key, value in file.settings.items()
                   if key.endswith("_checkbox") and key != "sdxl_checkbox" and value is True), "")
    if not file.gui:
        family = family or next((key for key in ("ae", "t5xxl", "clip_g", "discrete_flow_shift") if key in file), "")
    family = family or next((name for name in OTHER_FAMILIES if name in kind.rsplit("/", 1)[-1]), "")
    if family:
        raise RequestError(f"{file.path} is for another family of models ({kind or family}); {TRAINS}.")
    if file.gui and "sdxl" in file and not truth(file["sdxl"]):
        raise RequestError(f"{file.path} is for Stable Diffusion 1.5 (sdxl is false); {TRAINS}.")
    if file.gui and not kind and "network_dim" not in file:
        raise RequestError(f"{file.path} names no network, so it trains a whole model; {TRAINS}.")


def _as_the_gui_does(file: KohyaFile) -> None:
    """What the GUI makes of its fields before sd-scripts sees them; what it leaves out goes to `unused`."""
    kind = str(file.settings.pop("LoRA_type", "Standard"))
    module, algo = GUI_TYPES.get(kind.lower(), ("", ""))
    if not module:
        lycoris = kind.lower().startswith("lycoris/")
        module, algo = ("lycoris.kohya", kind[8:].lower()) if lycoris else (f"networks.{kind.lower()}", "")
    for key, value in (("network_module", module), ("algo", algo)):
        if value:
            _take(file, key, value, ("LoRA_type", kind))
    left_out = list(BLOCKWISE if module == "lycoris.kohya" else LYCORIS_ONLY)
    if module != "networks.dylora":
        left_out.append("unit")
    if kind.lower() == "standard":
        left_out += ["conv_dim", "conv_alpha"]
    _leave_out(file, left_out, f"not used with LoRA_type {kind}")
    noise = str(file.settings.pop("noise_offset_type", "Original"))
    unwanted = {"Original": "multires_noise_iterations", "Multires": "noise_offset"}.get(noise)
    if unwanted:
        others = {"Original": ["multires_noise_discount"], "Multires": ["adaptive_noise_scale", "noise_offset_random_strength"]}
        _leave_out(file, [unwanted, *others[noise]], f"not used with noise_offset_type {noise}")
        _take(file, unwanted, 0, ("noise_offset_type", noise))
    if "lr_warmup_steps" in file:
        key = "lr_warmup" if whole(file["lr_warmup_steps"]) > 0 else "lr_warmup_steps"
        _leave_out(file, [key], "lr_warmup and lr_warmup_steps say the same")
    for key in ("seed", "max_timestep", "save_last_n_steps", "save_last_n_epochs"):
        if key in file and whole(file[key]) == 0:
            _leave_out(file, [key], "0 means unset in the GUI")


def _leave_out(file: KohyaFile, keys: list[str], reason: str) -> None:
    for key in keys:
        if key in file:
            file.unused.append((*file.source(key), reason))
            del file.settings[key]


def _add_datasets(file: KohyaFile, inside: dict[str, Any], dataset_config: Path | None) -> None:
    named = file.get("dataset_config")
    if dataset_config:
        inside = _parse(dataset_config)
    elif named and "datasets" not in inside:
        found = file.find(str(named))
        if found is None:
            raise RequestError(f"{file.path} names the dataset settings {named}, which are not here. Say where they are with "
                               f"--dataset-config FILE.")
        inside = _parse(found)
    if dataset_config and "datasets" not in inside:
        raise RequestError(f"{dataset_config} holds no [[datasets]]: it is no dataset file of sd-scripts.")
    if "datasets" in inside:
        read_datasets(file, inside)


def _check_known(file: KohyaFile) -> None:
    known = [key for key in file.settings if key in KNOWN_KEYS]
    foreign = [key for key in file.settings if key not in KNOWN_KEYS and key not in FOREIGN_KEYS]
    if not known or len(foreign) > len(known):
        raise RequestError(f"{file.path} is no settings file of sd-scripts or kohya_ss: of its {len(file.settings)} keys, "
                           f"{len(known)} are known from there ({', '.join(known[:3]) or 'none'}).")
