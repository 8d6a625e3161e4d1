"""How the pictures are used: mirrored, held out, beside regularization pictures, how often, in how many steps."""

import math
from types import SimpleNamespace

from crumb.profiles.answers import Answers
from crumb.profiles.buckets import Crop, assign
from crumb.profiles.captions import holds_word
from crumb.profiles.dataset import Scan, mask_findings
from crumb.profiles.derivation import Derivation, Derived
from crumb.profiles.epoch import Epoch, bucket_findings, hold_out, plan_epoch
from crumb.profiles.pictures import Picture
from crumb.profiles.plan import plan_fields
from crumb.profiles.subsets import INHERITED, Subset, effective_subsets

VIEWS_PER_PICTURE = {"character": 100, "face": 100, "concept": 60, "style": 40}
"""How often each picture is seen in all; within STEP_RANGE in the end."""

STEP_RANGE = (400, 6000)
EPOCHS = 10
CLASS_WORD = {"character": "person", "face": "face", "style": "style", "concept": "object"}
SAVES_PER_RUN = 8
MIN_SPARING, MAX_HELD_OUT = 40, 16


def subsets_for(answers: Answers, repeats: int = 1) -> list[Subset]:
    """The folders that the answers name, before there is a plan to read them off."""
    answered = {"images": answers.images, "trigger": answers.trigger, "class_word": class_word_for(answers),
                "flip": answers.flip, "repeats": repeats}
    defaults = {name: plan_fields()[name].default for name in (*INHERITED, "regularization", "prior_loss_weight")}
    return effective_subsets(SimpleNamespace(**defaults | {"subsets": []} | answers.overrides | answered))


def class_word_for(answers: Answers) -> str:
    """The class word in use: the person's own, or the usual one of the subject."""
    return answers.class_word or CLASS_WORD[answers.subject]


def plan_crops(pictures: list[Picture], resolution: int, buckets: bool, upscale: bool) -> list[Crop]:
    return [assign(p.width, p.height, resolution, buckets=buckets, upscale=upscale) for p in pictures]


def derive_data(result: Derivation, answers: Answers, num_regularization: int) -> None:
    result.put("flip", answers.flip, "COMMON", "half of the views are mirrored: twice as many different views" if answers.flip
               else "as they are: text, logos and uneven faces or hair must not be learned mirrored")
    folder = answers.overrides.get("regularization", "")
    if not num_regularization:
        result.put("regularization", folder, "REG", "no regularization pictures were given")
        return
    result.values["regularization"] = Derived(
        folder, "REG", f"{num_regularization} pictures against overfitting, with as many views an epoch as training pictures")
    result.put("prior_loss_weight", 1.0, "REG", "they count as much as what is taught")


def derive_held_out(result: Derivation, scan: Scan) -> None:
    num_pictures = len(scan.pictures)
    if num_pictures < MIN_SPARING:
        result.put("held_out_pictures", 0, "OVERFIT", f"{num_pictures} pictures can spare none ({MIN_SPARING} could)")
        return
    held_out = min(MAX_HELD_OUT, num_pictures // 20)
    result.put("held_out_pictures", held_out, "OVERFIT", "a twentieth, only measured: their loss rises when the run overfits")


def derive_length(result: Derivation, answers: Answers, scan: Scan, num_pictures: int) -> Epoch:
    """repeats, epochs and steps from how often each picture should be seen; then what is measured in steps."""
    low, high = (bound * result.value("batch_size") for bound in STEP_RANGE)
    subsets = subsets_for(answers)
    held_out = hold_out(scan.pictures, subsets, result.value("held_out_pictures"), result.overrides.get("seed", 42))
    crops = plan_crops(scan.pictures, result.value("resolution"), result.value("buckets"),
                       result.overrides.get("upscale", False))
    num_weighted = sum(picture.repeats for index, picture in enumerate(scan.pictures)
                       if index not in held_out and not subsets[picture.subset].regularization)
    views = round(min(max(VIEWS_PER_PICTURE[answers.subject] * num_weighted, low), high) / num_weighted) or 1
    result.put("repeats", max(1, round(views / EPOCHS)), "COMMON", f"each picture is seen about {views} times in all")
    repeats = result.value("repeats")
    epoch = plan_epoch(scan.pictures, subsets_for(answers, repeats), crops, held_out)
    # Subsets with repeats of their own make an epoch longer or shorter, not the run.
    epochs = max(1, round(views * num_weighted / epoch.num_trained))
    num_taught = num_pictures - len(held_out)
    alike = epoch.num_trained == num_taught * repeats
    if result.value("optimizer") in ("Prodigy", "Prodigy8bit") and result.value("scheduler") == "constant_with_warmup":
        result.put("epochs", epochs + 1, "SCHED-PRODIGY", "one more, to make up for Prodigy's warm-up")
    else:
        result.put("epochs", epochs, "COMMON",
                   f"{repeats} repeats x {epochs} epochs = {repeats * epochs} views of each" if alike
                   else f"{epoch.num_trained} views an epoch x {epochs} epochs = {epoch.num_trained * epochs} views in all")
    _derive_steps(result, epoch, f"{num_taught} pictures x {repeats} repeats" if alike
                  else f"{epoch.num_trained} views of {num_taught} pictures")
    return epoch


def _derive_steps(result: Derivation, epoch: Epoch, shown: str) -> None:
    """steps, and what is measured in them; `shown` says in words what an epoch shows."""
    epochs = result.value("epochs")
    batch_size, accumulation = result.value("batch_size"), result.overrides.get("gradient_accumulation_steps", 1)
    if epoch.num_regularization:
        shown = f"({shown} + {epoch.num_regularization} views of regularization pictures)"
    num_batches = epoch.num_batches(batch_size)
    steps = math.ceil(num_batches * epochs / accumulation)
    accumulated = f" / {accumulation} accumulated" if accumulation > 1 else ""
    result.put("steps", steps, "COMMON", f"{shown} / batch {batch_size} = {num_batches} batches per epoch x {epochs} epochs"
                                         f"{accumulated} = {steps}")
    if "steps" in result.overrides:
        steps = result.value("steps")
        epochs = math.ceil(steps * accumulation / num_batches)
        result.put("epochs", epochs, "COMMON", f"{steps} steps of {num_batches} batches per epoch")
    every = _round_nicely(steps / SAVES_PER_RUN)
    result.put("save_every", every, "COMMON", f"{steps // every} times in {steps} steps, at round numbers")
    result.put("judge_every", result.value("save_every"), "LOSS", "each checkpoint's loss on fixed noise is measured")
    result.put("sample_every", every, "COMMON", "sample pictures with each checkpoint")


def warn_of_data(result: Derivation, scan: Scan, subsets: list[Subset], epoch: Epoch) -> None:
    for text in bucket_findings(scan.pictures, epoch, result.value("batch_size")):
        result.warn("BUCKET", text)
    for text in mask_findings(scan.pictures, subsets):
        result.warn("COMMON", text)
    trigger = subsets[0].trigger
    called = [p.path.name for p in scan.pictures if subsets[p.subset].regularization and trigger and p.caption
              and holds_word(p.caption, trigger)]
    if called:
        result.warn("REG", f"{len(called)} captions of regularization pictures hold the trigger {trigger!r} (first: "
                           f"{called[0]}): they undo what is taught. Take the word out of them.")


def _round_nicely(steps: float) -> int:
    """One leading digit of 1, 2 or 5 (or 25), so that checkpoints have round names."""
    if steps <= 1:
        return 1
    power = 10 ** math.floor(math.log10(steps))
    return max(1, int(max(nice * power for nice in (1, 2, 2.5, 5) if nice * power <= steps)))
