"""A file of kohya's as a crumb plan: what is taken over, what has no counterpart, and the rest as the guide derives it."""

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crumb.profiles.answers import Answers
from crumb.profiles.base_model import inspect_base_model
from crumb.profiles.data_rules import plan_crops
from crumb.profiles.dataset import Scan
from crumb.profiles.derivation import Derived
from crumb.profiles.epoch import hold_out, plan_epoch
from crumb.profiles.errors import RequestError
from crumb.profiles.hardware import resolve_gpu
from crumb.profiles.interview import ANSWERED, Interview, check_override, conclude
from crumb.profiles.kohya.table import FOREIGN_KEYS, KNOWN_KEYS, TABLE, Left, Row
from crumb.profiles.kohya.values import KohyaFile, Later, Length, Untaken, is_neutral
from crumb.profiles.plan import plan_fields
from crumb.profiles.subsets import effective_subsets

ANSWERS = {"base_model": "base", "vae": "vae", "prediction_type": "prediction", "images": "images", "class_word": "class_word",
           "name": "name", "flip": "flip"}
"""Settings that the interview asks for, by the answer's name."""

TWINS = ({"conv_rank", "targets"}, {"steps", "epochs"})
"""Settings that say the same; who fixes one of them decides both."""

BY_HAND = "--set gives another"
OPTIMIZER_ROW = next(row for row in TABLE if "optimizer" in row.crumb)
SECRETS = ("wandb_api_key", "huggingface_token")


@dataclass(frozen=True)
class Taken:
    """Keys of kohya's with their values, and the settings that they became. `off`: all of them switch something off."""

    kohya: dict[str, Any]
    crumb: dict[str, Any]
    note: str = ""
    off: bool = False


@dataclass
class Translation:
    """A file in crumb's terms."""

    file: KohyaFile
    answers: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)
    """Values, or Later for those that follow from the run's length."""
    taken: list[Taken] = field(default_factory=list)
    missing: list[Left] = field(default_factory=list)
    ignored: list[Left] = field(default_factory=list)

    def origin(self, name: str) -> str:
        """Where a setting's value came from, or "" where it did not come from the file."""
        keys = next((taken.kohya for taken in reversed(self.taken) if name in taken.crumb), None)
        return f"from {self.file.path.name} ({', '.join(keys)})" if keys else ""


def translate(file: KohyaFile, fixed: dict[str, Any] | None = None) -> Translation:
    """Every key of the file goes to one of the three lists; `fixed` are settings that the person gives another value."""
    result, fixed = Translation(file), fixed or {}
    if "optimizer" in fixed:  # rates and arguments are judged by the optimizer that will be used
        named = [key for key in ("optimizer_type", "optimizer_args") if key in file]
        result.missing += [Left(*file.source(key), BY_HAND) for key in named]
        file.settings["optimizer_type"] = fixed["optimizer"]
        file.settings.pop("optimizer_args", None)
    if fixed.get("conv_rank") == 0 or "conv" not in fixed.get("targets", "conv"):  # no convolution is left that they are for
        for key in ("conv_block_dims", "conv_block_alphas"):
            if key in file:
                result.missing.append(Left(*file.source(key), BY_HAND))
                del file.settings[key]
    names = set(fixed).union(*(twins for twins in TWINS if twins & set(fixed)))
    for row in TABLE:
        _read_row(result, row, names)
    result.missing += [Left(*entry) for entry in file.missing]
    result.ignored += [Left(*entry) for entry in file.unused]
    for key in file.settings:
        if key in KNOWN_KEYS:
            continue
        name, value = file.source(key)
        if key in FOREIGN_KEYS or key.startswith(("flux1_", "sd3_")) or key.endswith("_checkbox"):
            result.ignored.append(Left(name, value, "about another family of models"))
        elif is_neutral(value, (0, False, "")):
            result.ignored.append(Left(name, value, "switched off"))
        else:
            result.missing.append(Left(name, value, "crumb does not know this key"))
    return result


def _read_row(result: Translation, row: Row, fixed: set[str]) -> None:
    file = result.file
    present = [key for key in row.kohya if key in file]
    if not row.kohya or not (present or any(key in file for key in row.reads)):
        return
    sources = dict(file.source(key) for key in present)
    off = bool(present) and all(is_neutral(file[key], row.neutral) for key in present)
    if row.to_crumb is None:
        for key in present:
            name, value = file.source(key)
            where = result.ignored if row.ignored or is_neutral(file[key], row.neutral) else result.missing
            where.append(Left(name, "(hidden)" if key in SECRETS else value, row.reason))
        return
    if set(row.crumb) <= fixed:
        if row is not OPTIMIZER_ROW:
            _leave(result, row, sources, off, BY_HAND)
        return
    file.remarks.clear()
    try:
        values = {name: value for name, value in row.to_crumb(file).items() if name not in fixed}
        known = {name: _checked(name, value) for name, value in values.items() if _is_known(name)}
    except Untaken as error:
        can_hold = any(_is_known(name) for name in row.crumb)
        _leave(result, row, sources, off, str(error) if can_hold else row.reason)
        return
    unknown = {name: value for name, value in values.items() if not _is_known(name)}
    if unknown:
        unknown_off = off or all(not value or value == "off" for value in unknown.values())
        of_them = sources if not known else {", ".join(sources): next(iter(unknown.values()))}
        if not (known and unknown_off):
            _leave(result, row, of_them, unknown_off, row.reason or f"a crumb plan has no {' and no '.join(unknown)}")
    if known:
        _put(result, known)
        telling = {key for key in present if not is_neutral(file[key], row.neutral)}
        if telling:
            result.ignored += [Left(*file.source(key), "switched off") for key in present if key not in telling]
            sources = dict(file.source(key) for key in present if key in telling)
        result.taken.append(Taken(sources or {row.kohya[0]: None}, known, "; ".join(file.remarks), off))


def _is_known(name: str) -> bool:
    return name in plan_fields() or name == "epochs"


def _checked(name: str, value: Any) -> Any:
    if isinstance(value, Later) or name in ANSWERS:
        return value
    try:
        return check_override(name, value)
    except RequestError as error:
        raise Untaken(str(error).rstrip(".")) from None


def _put(result: Translation, values: dict[str, Any]) -> None:
    for name, value in values.items():
        if name in ANSWERS:
            result.answers[ANSWERS[name]] = value
        else:
            result.overrides[name] = value


def _leave(result: Translation, row: Row, sources: dict[str, Any], off: bool, reason: str) -> None:
    if not sources and not off:
        sources = {row.kohya[0]: None}
    for key, value in sources.items():
        (result.ignored if off else result.missing).append(Left(key, value, reason))


def answers_of(translation: Translation, given: Answers) -> Answers:
    """The interview's answers: what the person gave wins over what the file names."""
    file = translation.file
    for name, answer in ANSWERS.items():
        if getattr(given, answer):
            _forget(translation, name, f"{ANSWERED[name]} gives another")
    named = dict(translation.answers)
    if given.images and file.get("datasets.subsets"):
        _forget(translation, "subsets", "--images stands for all of them")
    elif file.get("datasets.subsets") and "subsets" not in translation.overrides:
        count = 1 + len(file["datasets.subsets"])
        raise RequestError(f"{file.path} names {count} folders of pictures and crumb takes one. Put them into one as "
                           f"sub-folders named N_name, N being their repeats, and give it with --images DIR.")
    for name, option, what in (("images", "--images DIR", "pictures"), ("base", "--base PATH", "base model")):
        if getattr(given, name):
            named[name] = getattr(given, name)
            continue
        found = file.find(str(named[name])) if named.get(name) else None
        if found is None:
            says = f"names {named[name]!r}, which is not here" if named.get(name) else "names none"
            raise RequestError(f"Which {what}? {file.path} {says}. Give {'them' if name == 'images' else 'it'} with {option}.")
        named[name] = str(found)
    _find_vae(translation, named)
    _judge_prediction(translation, named)
    if named.get("name"):
        named["name"] = re.sub(r"[^\w .+-]+", "-", str(named["name"])).lstrip("-. +")[:80].strip()
    blank = Answers()
    chosen = {one.name: getattr(given, one.name) for one in dataclasses.fields(Answers)
              if getattr(given, one.name) != getattr(blank, one.name)}
    ready = {name: value for name, value in translation.overrides.items() if not isinstance(value, Later)}
    return Answers(**{**named, **chosen, "overrides": {**ready, **given.overrides}})


def _find_vae(translation: Translation, named: dict[str, Any]) -> None:
    vae = str(named.pop("vae", ""))
    if not vae:
        return
    found = translation.file.find(vae)
    if found:
        named["vae"] = str(found)
    else:
        _forget(translation, "vae", "there is no such file here: the base's own is used, unless --vae names one")


def _judge_prediction(translation: Translation, named: dict[str, Any]) -> None:
    """A base that says what it predicts is believed before a preset, which was written for another one."""
    base = inspect_base_model(Path(named["base"]).expanduser())
    wanted = named.pop("prediction", "")
    if not wanted or wanted == base.prediction_type:
        return
    if base.prediction_type is None:
        named["prediction"] = wanted
    else:
        _forget(translation, "prediction_type", f"the base says that it predicts {base.prediction_type}")


def _forget(translation: Translation, name: str, reason: str) -> None:
    """Takes back what was taken over."""
    translation.overrides.pop(name, None)
    translation.answers.pop(ANSWERS.get(name, ""), None)
    for taken in [taken for taken in translation.taken if name in taken.crumb]:
        translation.taken.remove(taken)
        rest = {key: value for key, value in taken.crumb.items() if key != name}
        if rest:
            translation.taken.append(dataclasses.replace(taken, crumb=rest))
        translation.missing += [Left(key, value, reason) for key, value in taken.kohya.items()]


def conclude_import(translation: Translation, answers: Answers, scan: Scan) -> Interview:
    """The plan; what the file leaves open is derived by the guide's rules, and the rest says where it comes from."""
    _fit_precision(translation, answers)
    try:
        interview = conclude(answers, scan)
        later = {name: value for name, value in translation.overrides.items() if isinstance(value, Later)}
        if later:
            length = _length(interview)
            for name, value in later.items():
                translation.overrides[name] = answers.overrides[name] = check_override(name, value.of(length))
            interview = conclude(answers, scan)
    except RequestError as error:
        where = translation.file.path
        raise RequestError(f"{where} makes no plan: {error} A setting is mended with --set KEY=VALUE.") from None
    values = interview.derivation.values
    for name in values:
        origin = translation.origin(name)
        if origin and name in translation.overrides:
            values[name] = Derived(values[name].value, "", origin)
    return interview


def _fit_precision(translation: Translation, answers: Answers) -> None:
    """A preset's precision is one of its author's card; where this card lacks it, the guide's is taken."""
    gpu = resolve_gpu(answers.gpu, answers.vram_gib)
    precision = translation.overrides.get("mixed_precision")
    unfit = (precision == "fp16" and not gpu.vram_gib) or (precision == "bf16" and gpu.vram_gib and not gpu.has_bf16)
    if unfit:
        _forget(translation, "mixed_precision", f"{gpu.name} has no fast {precision}")
        answers.overrides.pop("mixed_precision")


def _length(interview: Interview) -> Length:
    plan, pictures, subsets = interview.plan, interview.scan.pictures, effective_subsets(interview.plan)
    crops = plan_crops(pictures, plan.resolution, plan.buckets, plan.upscale)
    epoch = plan_epoch(pictures, subsets, crops, hold_out(pictures, subsets, plan.held_out_pictures, plan.seed))
    return Length(plan.steps, epoch.num_batches(plan.batch_size) / plan.gradient_accumulation_steps, len(pictures))
