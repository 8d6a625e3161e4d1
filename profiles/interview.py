"""Answers in, plan out: gathers the facts (pictures, base header, GPU), derives, checks.

One way for `crumb plan`, the wizard and the demo, so that none of them can accept what another refuses.
"""

import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from crumb.profiles.answers import LOOKS, SUBJECTS, Answers
from crumb.profiles.base_model import BaseModel, check_vae, hints_v_prediction, inspect_base_model
from crumb.profiles.data_rules import class_word_for, subsets_for
from crumb.profiles.dataset import Scan, scan_subsets, training_caption
from crumb.profiles.derivation import Derivation
from crumb.profiles.derive import derive
from crumb.profiles.errors import RequestError
from crumb.profiles.hardware import Gpu, resolve_gpu
from crumb.profiles.lora_file import starting_findings
from crumb.profiles.plan import Plan, check_value, dump_plan, plan_fields
from crumb.profiles.plan_rules import missing_packages
from crumb.profiles.sample_prompts import without_options

NUM_SAMPLE_PROMPTS = 2
NUM_REMARKS = 5

ANSWERED = {
    "name": "--name", "images": "--images", "base_model": "--base", "vae": "--vae", "prediction_type": "--prediction",
    "trigger": "--trigger", "class_word": "--class", "flip": "--flip", "skip_broken": "--skip-broken", "vram_gib": "--vram",
    "device": "--gpu",
}
"""Settings that come from an answer, which others follow from as well: an override would contradict it."""

UNSETTABLE = {"created": "it is the moment the plan is made"}


@dataclass(frozen=True)
class Interview:
    """Everything known once the questions are answered."""

    answers: Answers
    scan: Scan
    base: BaseModel
    gpu: Gpu
    derivation: Derivation
    plan: Plan

    def toml(self) -> str:
        """The plan file: values under their reasons; advice that is no setting stands on top as comments."""
        reasons = {
            name: f"{derived.reason} [{derived.rule}]" if derived.rule else derived.reason
            for name, derived in self.derivation.values.items()
        }
        advice = [f"{name} = {derived.value} ({reasons[name]})"
                  for name, derived in self.derivation.values.items() if name not in plan_fields()]
        warnings = [f"warning: {warning['text']}" + (f" [{warning['rule']}]" if warning["rule"] else "")
                    for warning in self.derivation.warnings]
        return dump_plan(self.plan, reasons, advice + warnings)


def conclude(answers: Answers, scan: Scan | None = None) -> Interview:
    """The plan that follows from the answers; `scan` spares a second look at the folders it holds.

    Raises RequestError for the first answer that can't stand.
    """
    check_answers(answers)
    base = inspect_base_model(Path(answers.base).expanduser())
    if not base.has_vae and not answers.vae:
        raise RequestError(f"{base.path} has no VAE baked in. Name one with --vae FILE (any SDXL VAE .safetensors).")
    if answers.vae:
        check_vae(answers.vae)
    prediction_type = choose_prediction_type(answers, base)
    scan = scan_subsets(subsets_for(answers), scan)
    check_scan(scan, answers.skip_broken)
    gpu = resolve_gpu(answers.gpu, answers.vram_gib)
    derivation = derive(answers, scan, base, gpu)
    if base.prediction_type is None and not answers.prediction:
        derivation.warn("", f"The base does not say what it predicts ({base.prediction_evidence}); taken as epsilon, as "
                            f"nearly all are. If it is a v-prediction model, say --prediction v_prediction.")
    remarks = [problem for problem in scan.problems if not problem.fatal]
    for problem in remarks[:NUM_REMARKS]:
        derivation.warn("", f"{problem.path.name}: {problem.text}")
    if len(remarks) > NUM_REMARKS:
        derivation.warn("", f"{len(remarks) - NUM_REMARKS} more files have remarks like these; engine.log will name them all.")
    settings = {
        name: _with_absolute_folders(name, derived.value)
        for name, derived in derivation.values.items() if name in plan_fields()
    }
    plan = Plan(**{
        "name": answers.name or default_name(answers),
        "created": datetime.now().astimezone().isoformat(timespec="seconds"),
        "base_model": str(base.path.absolute()),
        "vae": str(Path(answers.vae).expanduser().absolute()) if answers.vae else "",
        "prediction_type": prediction_type,
        "zero_terminal_snr": base.zero_terminal_snr,
        "images": str(scan.folder.absolute()),
        "trigger": answers.trigger,
        "class_word": class_word_for(answers),
        "sample_prompts": default_prompts(answers, scan),
        "skip_broken": answers.skip_broken,
        **settings,
    })
    for text in starting_findings(plan):
        derivation.warn("", text)
    if plan.zero_terminal_snr and plan.prediction_type == "epsilon":
        derivation.warn("", "zero_terminal_snr is for v-prediction bases: at its last noise level nothing is left of the "
                            "picture, and noise alone can't tell it.")
    for name in missing_packages(plan.trackers):
        derivation.warn("", f"trackers names {name}, whose package is missing here. Before training: `pip install {name}`.")
    return Interview(answers, scan, base, gpu, derivation, plan)


def _with_absolute_folders(name: str, value: Any) -> Any:
    """A plan is taken up again from any folder."""
    if name in ("regularization", "start_from") and value:
        return str(Path(value).expanduser().absolute())
    if name == "subsets":
        return [table | {"images": str(Path(table["images"]).expanduser().absolute())} for table in value]
    return value


def check_answers(answers: Answers) -> None:
    for name, value, allowed in (("subject", answers.subject, SUBJECTS), ("look", answers.look, LOOKS),
                                 ("prediction", answers.prediction, ("", "epsilon", "v_prediction"))):
        if value not in allowed:
            raise RequestError(f"{name} is {value!r}; it must be one of {', '.join(filter(None, allowed))}.")
    if not answers.images:
        raise RequestError("No pictures were named. Say where they are with --images DIR.")
    if not answers.base:
        raise RequestError("No base model was named. Give an SDXL .safetensors file or a diffusers folder with --base PATH.")
    if "," in answers.trigger:
        raise RequestError(f"The trigger {answers.trigger!r} holds a comma, which separates tags. Use one word.")
    for name, value in answers.overrides.items():
        check_override(name, value)


def check_override(name: str, value: Any) -> Any:
    """A setting fixed by hand, as its right type. `epochs` is no setting of the plan but gives its steps."""
    if name in ANSWERED:
        raise RequestError(f"{name} is an answer that other settings follow from. Give it as {ANSWERED[name]}.")
    if name in UNSETTABLE:
        raise RequestError(f"{name} can't be set: {UNSETTABLE[name]}.")
    if name == "epochs":
        if isinstance(value, str) and value.isdigit():
            value = int(value)
        if not isinstance(value, int) or not 1 <= value <= 10_000:
            raise RequestError(f"epochs is {value!r}; it must be a whole number from 1 to 10000.")
        return value
    return check_value(name, value)


def check_scan(scan: Scan, skip_broken: bool) -> None:
    """Pictures that can't be used need consent before the run goes on without them."""
    broken = [problem for problem in scan.problems if problem.fatal]
    if broken and not skip_broken:
        named = "; ".join(f"{problem.path.name}: {problem.text}" for problem in broken[:5])
        more = f" (and {len(broken) - 5} more)" if len(broken) > 5 else ""
        beside = f" and {len(scan.parts) - 1} more folders" if len(scan.parts) > 1 else ""
        raise RequestError(f"{len(broken)} of the pictures in {scan.folder}{beside} can't be used: {named}{more}. Mend or "
                           f"remove them, or train without them: --skip-broken.")


def choose_prediction_type(answers: Answers, base: BaseModel) -> str:
    if answers.prediction:
        if base.prediction_type and base.prediction_type != answers.prediction:
            raise RequestError(f"{base.path.name} marks itself as {base.prediction_type} ({base.prediction_evidence}); "
                               f"--prediction {answers.prediction} contradicts it. Leave the option out.")
        return answers.prediction
    if base.prediction_type is None and hints_v_prediction(base.path):
        raise RequestError(f"{base.path.name} may be a v-prediction model: {base.prediction_evidence}. Training it the "
                           f"wrong way ruins the LoRA. Say --prediction v_prediction or --prediction epsilon.")
    return base.prediction_type or "epsilon"


def default_name(answers: Answers) -> str:
    """From the trigger, else from the folder; made fit for a file name."""
    raw = answers.trigger or Path(answers.images).expanduser().absolute().name
    return re.sub(r"[^\w.-]+", "-", raw).strip("-._") or "my-lora"


def default_prompts(answers: Answers, scan: Scan) -> list[str]:
    """The bare trigger and class, then one of the set's own captions."""
    subsets, prompts = subsets_for(answers), [without_options(f"{answers.trigger} {class_word_for(answers)}")]
    for picture in scan.pictures:
        caption = without_options(training_caption(picture, subsets[picture.subset]))
        if caption not in prompts and not subsets[picture.subset].regularization:
            prompts.append(caption)
        if len(prompts) == NUM_SAMPLE_PROMPTS:
            break
    return prompts
