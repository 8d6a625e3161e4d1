"""Optimizer, rates and schedule in kohya's keys, read into plan settings.

Each function takes a whole file, since these keys change meaning with their neighbours.
"""

import dataclasses
from typing import Any

from crumb.profiles.errors import RequestError
from crumb.profiles.kohya.values import KohyaFile, Later, Untaken, argument, number, pairs
from crumb.profiles.optimizers import ADAPTIVE_OPTIMIZERS, OPTIMIZER_ARGS, OPTIMIZERS
from crumb.profiles.plan import SCHEDULERS

NEAREST_OPTIMIZERS = {
    "pagedadamw": "AdamW", "pagedadamw32bit": "AdamW", "pagedadamw8bit": "AdamW8bit", "adam": "AdamW", "adam8bit": "AdamW8bit",
    "lion8bit": "Lion", "pagedlion8bit": "Lion", "dadaptation": "DAdaptAdam", "dadaptadampreprint": "DAdaptAdam",
    "dadaptadan": "DAdaptAdam", "dadaptadanip": "DAdaptAdam",
}


def optimizer(file: KohyaFile) -> dict[str, Any]:
    named = str(file.get("optimizer_type") or ("AdamW8bit" if file.is_on("use_8bit_adam") else
                                               "Lion" if file.is_on("use_lion_optimizer") else ""))
    if not named:
        file.remarks.append("sd-scripts' own where none is named")
        return {"optimizer": "AdamW"}
    kind = named.rsplit(".", 1)[-1].lower()  # a class's full path is allowed there
    for name in OPTIMIZERS:
        if name.lower() == kind:
            return {"optimizer": name}
    if kind in NEAREST_OPTIMIZERS:
        file.remarks.append(f"the nearest: crumb has no {named}")
        return {"optimizer": NEAREST_OPTIMIZERS[kind]}
    raise RequestError(f"{file.path}: the optimizer is {named}, for which crumb has no like; it has {', '.join(OPTIMIZERS)}. "
                       f"Choose one with --set optimizer=NAME, and a rate that suits it with --set learning_rate=RATE.")


def optimizer_args(file: KohyaFile) -> dict[str, Any]:
    name = optimizer(_quietly(file))["optimizer"]
    arguments, dropped = {}, []
    for key, text in pairs(file.get("optimizer_args", [])).items():
        value = None if text in ("None", "") else argument(text)
        if value is None:
            continue
        if key in OPTIMIZER_ARGS[name]:
            arguments[key] = [number(item) for item in value] if isinstance(value, list) else value
        else:
            dropped.append(f"{key}={text}")
    if dropped:
        file.remarks.append(f"without {', '.join(dropped)}: crumb's {name} takes none such")
    elif not arguments:
        file.remarks.append(f"none given: {name}'s own")
    return {"optimizer_args": arguments}


def learning_rate(file: KohyaFile) -> dict[str, Any]:
    """The U-Net's rate; with an optimizer that finds it itself, always 1 or what was given as a factor near it."""
    general, unet = number(file.get("learning_rate", 0)), number(file.get("unet_lr", 0))
    if file.is_on("network_train_text_encoder_only") or (unet == 0 and not general and "text_encoder_lr" in file
                                                         and any(text_encoder_rates(_quietly(file)).values())):
        raise RequestError(f"{file.path} trains the text encoders alone; crumb always trains the U-Net. Set unet_lr there, "
                           f"and leave network_train_text_encoder_only out.")
    rate = unet or general
    if not rate:
        raise RequestError(f"{file.path}: every learning rate in it is 0, so nothing would learn. Set learning_rate there.")
    return {"learning_rate": _fit_rate(file, rate)}


def _fit_rate(file: KohyaFile, rate: float) -> float:
    names = ("optimizer_type", "use_8bit_adam", "use_lion_optimizer")
    name = optimizer(_quietly(file))["optimizer"] if any(key in file for key in names) else "AdamW"
    if name in ADAPTIVE_OPTIMIZERS and 0 < rate < 0.1:
        file.remarks.append(f"{name} finds the rate itself and takes this as a factor: {rate:g} would hardly learn, so 1")
        return 1.0
    if name == "Adafactor" and optimizer_args(_quietly(file))["optimizer_args"].get("relative_step", True) and rate > 0.1:
        raise Untaken("Adafactor finds its rate itself (relative_step), so crumb needs none")
    return rate


def text_encoder_rates(file: KohyaFile) -> dict[str, Any]:
    """Unset means learning_rate there, unless only the U-Net is trained."""
    general, unet = number(file.get("learning_rate", 0)), number(file.get("unet_lr", 0))
    given = file.get("text_encoder_lr")
    rates = [number(rate) for rate in (given if isinstance(given, list) else [given] if given is not None else [])]
    only_unet = file.is_on("network_train_unet_only") or (file.gui and unet and not any(rates))
    if only_unet:
        rates = [0.0]
    elif not rates or (file.gui and not any(rates)):
        rates = [general]
        if general:
            file.remarks.append("unset: sd-scripts trains them at learning_rate")
    first, second = (_fit_rate(file, rate) for rate in (rates * 2)[:2])  # one rate is for both
    return {"text_encoder_learning_rate": first, "text_encoder_2_learning_rate": second}


def text_encoder_stop(file: KohyaFile) -> dict[str, Any]:
    """As a share of all steps; the GUI has per cent, 0 = never. Below 0 the encoders don't learn at all."""
    if "stop_text_encoder_training_pct" in file:
        share = number(file["stop_text_encoder_training_pct"]) / 100
        return {"text_encoder_stop_after": max(share, 0.0) if share else 1.0}
    steps = number(file["stop_text_encoder_training"])
    if steps < 0:
        return {"text_encoder_stop_after": 0.0}
    return {"text_encoder_stop_after": Later(lambda length: min(1.0, steps / length.steps)) if steps else 1.0}


def scheduler(file: KohyaFile) -> dict[str, Any]:
    name = str(file["lr_scheduler"]).lower()
    if name in SCHEDULERS:
        return {"scheduler": name}
    plain_one = "constant_with_warmup" if _has_warmup(file) else "constant"
    if name.startswith("adafactor"):
        file.remarks.append("Adafactor's own schedule; crumb's Adafactor follows it by itself")
        return {"scheduler": "constant"}
    file.remarks.append(f"the nearest: crumb has no {name}")
    return {"scheduler": plain_one}


def _has_warmup(file: KohyaFile) -> bool:
    value = warmup(file)["warmup_ratio"]
    return isinstance(value, Later) or value > 0


def warmup(file: KohyaFile) -> dict[str, Any]:
    """Whole steps, a share below 1 or "10%"; the GUI has per cent."""
    if "lr_warmup" in file:
        return {"warmup_ratio": number(file["lr_warmup"]) / 100}
    value = file.get("lr_warmup_steps", 0)
    if isinstance(value, str) and value.endswith("%"):
        return {"warmup_ratio": number(value[:-1]) / 100}
    if isinstance(value, float) and value <= 1:
        return {"warmup_ratio": value}
    steps = number(value)
    if 0 < steps < 1 or not steps:
        return {"warmup_ratio": steps}
    return {"warmup_ratio": Later(lambda length: min(1.0, steps / length.steps))}


def _quietly(file: KohyaFile) -> KohyaFile:
    """The same file, so that asking for another setting leaves no remark on this one."""
    return dataclasses.replace(file, remarks=[])
