"""The folders of pictures in a dataset file of sd-scripts, and those below a folder of crumb's."""

import os
import re
from pathlib import Path
from typing import Any

from crumb.profiles.dataset import PICTURE_SUFFIXES
from crumb.profiles.errors import RequestError
from crumb.profiles.kohya.values import KohyaFile, Untaken, truth, whole

MAX_REPEATS = 999
DATASET_NAMES = {"image_dir": "train_data_dir", "batch_size": "train_batch_size"}
OF_A_SUBSET = ("image_dir", "num_repeats", "class_tokens", "flip_aug")
"""What a further folder may say for itself in crumb, too."""


def picture_folders(folder: Path) -> dict[Path, int]:
    """Every folder below this one that holds pictures, with the repeats that folders named N_name give it."""
    found: dict[Path, int] = {}
    for path, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        here = Path(path)
        repeats = found_repeats(here.relative_to(folder))
        if repeats and any(Path(name).suffix.lower() in PICTURE_SUFFIXES for name in files):
            found[here] = repeats
    return found


def found_repeats(below: Path) -> int:
    """The product of all N in a path of folders named N_name, as the scan counts them."""
    repeats = 1
    for name in below.parts:
        match = re.match(r"([0-9]{1,6})_", name)
        if match and int(match[1]) <= MAX_REPEATS:
            repeats *= int(match[1])
    return repeats


def read_datasets(file: KohyaFile, document: dict[str, Any]) -> None:
    """Puts a dataset file's settings over those of the file; nearer ones win, as in sd-scripts."""
    general, datasets = document.get("general", {}), document["datasets"]
    subsets = []
    try:
        for dataset in datasets:
            of_dataset = {key: value for key, value in dataset.items() if key != "subsets"}
            subsets += [{**general, **of_dataset, **subset} for subset in dataset.get("subsets", [{}])]
    except (AttributeError, TypeError):
        raise RequestError(f"{file.path}: [[datasets]] must be tables, each with [[datasets.subsets]] in it.") from None
    try:
        training = [subset for subset in subsets if not truth(subset.get("is_reg", False))]
        regular = [subset for subset in subsets if subset not in training]
        if not training:
            raise RequestError(f"{file.path}: its datasets name no folder of pictures to train on.")
        first, *others = training
        whole_folder = _common_folder(file, training)
    except Untaken as error:
        raise RequestError(f"{file.path}: {error}, in its datasets. Mend it there.") from None
    if whole_folder:
        first, others = first | whole_folder, []
    for key in dict.fromkeys(key for subset in training for key in subset if key != "is_reg"):
        _take_from(file, key, first, training, is_own=key in OF_A_SUBSET)
    if len(regular) == 1 and whole(regular[0].get("num_repeats", 1)) == 1 and "image_dir" in regular[0]:
        file.settings["reg_data_dir"] = regular[0]["image_dir"]
        file.sources["reg_data_dir"] = ("image_dir of is_reg", regular[0]["image_dir"])
        regular = []
    if others or regular:
        file.settings["datasets.subsets"] = others + regular
        file.sources["datasets.subsets"] = ("datasets.subsets", [subset.get("image_dir", "") for subset in others + regular])


def _take_from(file: KohyaFile, key: str, first: dict[str, Any], training: list[dict[str, Any]], is_own: bool) -> None:
    values = [subset.get(key) for subset in training]
    if not is_own and any(value != values[0] for value in values):
        file.missing.append((key, values, "crumb has one for all folders; the first folder's is taken"))
    name = DATASET_NAMES.get(key, key)
    if first.get(key) in (None, ""):
        return
    file.settings[name] = first[key]
    file.sources[name] = (key, first[key])


def _common_folder(file: KohyaFile, subsets: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The folder above them all, where it holds just these and their names explain the repeats: what crumb takes whole."""
    paths = [file.find(str(subset.get("image_dir", ""))) for subset in subsets if subset.get("image_dir")]
    if len(subsets) < 2 or len(paths) < len(subsets) or None in paths:
        return None
    paths = [Path(os.path.abspath(path)) for path in paths]
    top = paths[0].parent
    beside = {path for path in top.iterdir() if not path.name.startswith(".")
              and (path.is_dir() or path.suffix.lower() in PICTURE_SUFFIXES)}
    if beside != set(paths) or len(beside) < len(paths):
        return None
    repeats = {whole(subset.get("num_repeats", 1)) / found_repeats(Path(path.name)) for subset, path in zip(subsets, paths)}
    alike = all(subset.get(key) == subsets[0].get(key) for subset in subsets for key in OF_A_SUBSET[2:])
    if len(repeats) > 1 or not min(repeats).is_integer() or not alike:
        return None
    return {"image_dir": str(top), "num_repeats": int(min(repeats))}
