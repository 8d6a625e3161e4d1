"""Answers + facts -> values, each with the guide rule behind it and a reason in words.

Pure functions: the wizard runs them at every answer, `crumb plan` once, and both get the same plan.
Rule ids are those of the training guide; COMMON marks what the guide leaves open and the field agrees on.
"""

from dataclasses import replace

from crumb.profiles.answers import Answers
from crumb.profiles.base_model import BaseModel
from crumb.profiles.blocks import ATTENTION_BLOCKS, CONVOLUTION_BLOCKS, RESNET_BLOCKS
from crumb.profiles.data_rules import class_word_for, derive_data, derive_held_out, derive_length, subsets_for, warn_of_data
from crumb.profiles.dataset import Scan
from crumb.profiles.derivation import Derivation, Derived
from crumb.profiles.hardware import Gpu
from crumb.profiles.memory_rules import (
    FULL_MODEL_PARAMETERS,
    derive_memory,
    rank_fits,
    text_encoders_learn,
    warn_of_memory,
)
from crumb.profiles.optimizers import ADAPTIVE_OPTIMIZERS
from crumb.profiles.plan_rules import BLOCK_BOUNDS

COUNT_RANGE = {"character": (10, 50), "face": (10, 50), "style": (100, 4000), "concept": (50, 2000)}
"""Pictures a set should have, by subject (DATA-COUNT); a face counts as a character."""

FP16_BELOW_GIB = 16e9 / 2**30
"""The guide's 16 GB; a card sold with 16 reports 15 to 16 GiB, less where it corrects errors in memory."""

LARGE_SET = 100
"""Pictures from which on the guide speaks of a large set (RANK-RAISE)."""
MIN_FITTED_RANK = 8
CAPTION_VARIANTS = 8
FULL_TEXT_VALUES = 77 * 2048 + 1280
"""Numbers in one prompt's conditioning of a full-size SDXL."""
SMALL_BASE_RATE = 1e-3


def derive(answers: Answers, whole_scan: Scan, base: BaseModel, gpu: Gpu) -> Derivation:
    """All values of the plan that nobody was asked for; `answers.overrides` win and are marked as such.

    What follows from the number of pictures follows from training pictures alone.
    """
    result = Derivation(answers.overrides)
    subsets = subsets_for(answers)
    scan = replace(whole_scan, pictures=[p for p in whole_scan.pictures if not subsets[p.subset].regularization])
    _derive_precision(result, gpu)
    result.put("resolution", base.native_resolution, "CROP", f"the base was made for {base.native_resolution} pixels")
    result.put("buckets", True, "BUCKET", "pictures of one size train together; nothing need be cropped by hand")
    _derive_optimizer(result, base, gpu)
    _derive_network(result, answers, scan, base, gpu)
    _derive_noise(result, scan)
    derive_memory(result, base, gpu)
    _derive_captions(result, answers, scan, base)
    derive_data(result, answers, len(whole_scan.pictures) - len(scan.pictures))
    derive_held_out(result, scan)
    epoch = derive_length(result, answers, whole_scan, len(scan.pictures))
    for name in answers.overrides:
        if name not in result.values:
            result.put(name, None, "", "")
    _warn(result, answers, scan, base, gpu)
    warn_of_data(result, whole_scan, subsets, epoch)
    return result


def _derive_precision(result: Derivation, gpu: Gpu) -> None:
    if gpu.vram_gib == 0:
        result.put("mixed_precision", "no", "PREC-MIXED", "no GPU: fp32, which is what processors are fast at")
    elif not gpu.has_bf16:
        reason = f"{gpu.name} is older than RTX 30 and has no bf16"
        if "fp16_convolutions" in gpu.quirks:
            reason += "; convolutions in fp16, which some GTX 16 cards compute wrongly, are tried before the run"
        result.put("mixed_precision", "fp16", "PREC-MIXED", reason)
    elif gpu.vram_gib < FP16_BELOW_GIB:
        result.put("mixed_precision", "fp16", "PREC-MIXED",
                   f"the guide's choice below 16 GB of VRAM. {gpu.name} has bf16 too, the best choice by the guide's own word: "
                   f"as small and as fast, and it can't overflow, so no step is dropped and nothing scaled. "
                   f"--set mixed_precision=bf16 takes it")
    else:
        result.put("mixed_precision", "bf16", "PREC-MIXED",
                   f"{gpu.name} has bf16, the best choice where it exists, and 16 GB of VRAM or more")
    result.put("save_precision", "fp16", "PREC-SAVE", "the guide's default; every program reads it, half the size of float")


def _derive_network(result: Derivation, answers: Answers, scan: Scan, base: BaseModel, gpu: Gpu) -> None:
    result.put("method", "lora", "METHOD", "a small file that works with any model of the same family")
    rank = {"character": 32, "face": 32, "concept": 32, "style": 64}[answers.subject]
    reasons = [f"{rank} to start for a {answers.subject}"]
    if answers.look == "anime" and rank > 16:
        rank //= 2
        reasons.append("halved for anime, which is less complex than photographs")
    if len(scan.pictures) >= LARGE_SET:
        rank = min(128, rank * 2)
        reasons.append(f"doubled for {len(scan.pictures)} pictures ({LARGE_SET} or more)")
    if base.num_unet_parameters > FULL_MODEL_PARAMETERS and gpu.vram_gib:
        wanted = rank
        while rank > MIN_FITTED_RANK and not rank_fits(result, gpu, rank, MIN_FITTED_RANK):
            rank //= 2
        if rank < wanted:
            reasons.append(f"lowered to {rank} to fit {gpu.vram_gib:g} GiB")
    result.put("rank", rank, "RANK-RANGE", "; ".join(reasons))
    rank = result.value("rank")
    alpha = rank / 2 if rank < 32 else max(16, rank // 2 // 16 * 16)
    result.put("alpha", float(alpha), "ALPHA-HALF", f"half the rank ({rank}), in multiples of 16 where the rank allows")
    _derive_convolutions(result, rank, base)


def _derive_convolutions(result: Derivation, rank: int, base: BaseModel) -> None:
    """`targets` and `conv_rank` say the same thing twice; whichever is fixed by hand decides both."""
    small = base.num_unet_parameters < FULL_MODEL_PARAMETERS and not {"conv_rank", "targets"} & set(result.overrides)
    wanted = small or result.overrides.get("conv_rank", 0) > 0 or "conv" in result.overrides.get("targets", "")
    if not wanted:
        result.put("targets", "attention+ff", "COMMON", "attention, feed-forward and projections: what kohya calls LoRA")
        result.put("conv_rank", 0, "CONV", "the 3x3 convolutions don't learn unless asked")
        return
    result.put("targets", "attention+ff+conv", "CONV", "this base is small, and makes its colours and strokes in convolutions"
               if small else "conv_rank is set, so the convolutions learn")
    result.put("conv_rank", max(1, rank // 2), "CONV", "half the rank")
    share = result.value("alpha") / rank
    result.put("conv_alpha", max(0.1, result.value("conv_rank") * share), "ALPHA-HALF", "the same share of its rank as alpha")


def _derive_optimizer(result: Derivation, base: BaseModel, gpu: Gpu) -> None:
    if gpu.vram_gib == 0:
        result.put("optimizer", "AdamW", "OPT-DEFAULT", "32-bit AdamW: 8-bit states save GPU memory, and there is no GPU")
    elif gpu.vram_gib >= 12:
        result.put("optimizer", "Prodigy", "OPT-SDXL", f"suits SDXL and finds the rate itself; {gpu.vram_gib:g} GiB hold it")
    else:
        result.put("optimizer", "AdamW8bit", "OPT-DEFAULT", f"the default; spares memory on {gpu.vram_gib:g} GiB")
    _derive_rate(result, base, result.value("optimizer"))
    result.put("text_encoder_learning_rate", 0.0, "LR", "the text encoders don't learn: the U-Net alone is enough for most")
    result.put("text_encoder_2_learning_rate", 0.0, "LR", "encoder 2 doesn't learn, unless asked")
    result.put("warmup_ratio", 0.1, "WARMUP", "10 % of all steps; only constant_with_warmup uses it")


def _derive_rate(result: Derivation, base: BaseModel, optimizer: str) -> None:
    """The optimizer's arguments, its rate and how that changes over the run."""
    if optimizer in ADAPTIVE_OPTIMIZERS:
        rule = "OPT-DADAPT" if optimizer == "DAdaptAdam" else "OPT-PRODIGY"
        arguments = {"decouple": True, "weight_decay": 0.01, "betas": [0.9, 0.999]}
        if optimizer != "DAdaptAdam":
            arguments |= {"d_coef": 2.0, "use_bias_correction": True, "safeguard_warmup": False}
        result.put("optimizer_args", arguments, rule, "the guide's arguments")
        result.put("learning_rate", 1.0, rule, f"{optimizer} finds the rate; 1 leaves it alone")
        result.put("scheduler", "constant", "SCHED-PRODIGY" if optimizer != "DAdaptAdam" else rule,
                   f"{optimizer} runs well with constant")
        return
    result.put("optimizer_args", {} if optimizer == "Adafactor" else {"weight_decay": 0.01}, "OPT-DEFAULT",
               "Adafactor's own" if optimizer == "Adafactor" else "the usual weight decay")
    rate, reason = 1e-4, "the usual rate for SDXL; times alpha/rank it is the effective one"
    if base.num_unet_parameters < FULL_MODEL_PARAMETERS:
        rate, reason = SMALL_BASE_RATE, "this base is narrow: ten times SDXL's usual rate"
    if optimizer == "Lion":
        rate, reason = rate / 5, "a fifth of AdamW's: Lion's steps are all of full size"
    if optimizer == "Adafactor":
        reason = "not used: Adafactor adjusts its rate itself"
    result.put("learning_rate", rate, {"Lion": "OPT-LION", "Adafactor": "OPT-ADAFACTOR"}.get(optimizer, "LR"), reason)
    if optimizer == "Adafactor":
        result.put("scheduler", "constant", "OPT-ADAFACTOR", "Adafactor ignores it")
    else:
        result.put("scheduler", "constant_with_warmup", "SCHED", "constant after a warm-up, as the guide advises")


def _derive_noise(result: Derivation, scan: Scan) -> None:
    result.put("noise_offset", 0.0, "NOISE-OFFSET", "off, the guide's default; 0.05-0.15 helps very dark or bright sets")
    result.put("multires_noise_iterations", 0, "NOISE-MULTIRES", "off, the guide's default; 6-10 is the other way to help them")
    small = len(scan.pictures) < LARGE_SET
    result.put("multires_noise_discount", 0.3 if small else 0.8, "NOISE-MULTIRES",
               f"0.1-0.3 for a small set ({len(scan.pictures)} pictures), should iterations be above 0" if small
               else "the guide's advice, should iterations be above 0")


def _derive_captions(result: Derivation, answers: Answers, scan: Scan, base: BaseModel) -> None:
    result.put("clip_skip", 2, "CLIP-SKIP", "fixed: SDXL itself was trained on the encoders' second-last layer")
    detailed = answers.subject in ("character", "face")
    result.put("tag_threshold", 0.35 if detailed else 0.25, "TAG-COARSE",
               "for tagging tools: the usual threshold" if detailed
               else f"for tagging tools: a {answers.subject} set needs no detailed tags; cap their number")
    result.put("keep_tokens", 1 if answers.trigger else 0, "TAG-TRIGGER", "the trigger word stays in front, should tags be "
               "shuffled or left out" if answers.trigger else "there is no trigger word to keep in front")
    _derive_variants(result, answers, scan, base)


def _derive_variants(result: Derivation, answers: Answers, scan: Scan, base: BaseModel) -> None:
    """How many texts of a varying caption are kept encoded, and what that costs on disk."""
    result.put("caption_variants", CAPTION_VARIANTS, "COMMON", "captions don't vary: each is encoded once")
    if not (result.overrides.get("shuffle_captions") or result.overrides.get("tag_dropout", 0) > 0):
        return
    kept = result.values["caption_variants"]
    if text_encoders_learn(result):
        reason = "not used: the text encoders learn, so every text is encoded anew"
    else:
        value_bytes = 2 if result.value("mixed_precision") == "bf16" else 4
        # Tags that may move: a caption with one of them is one text, whatever is shuffled.
        num_loose = [caption.count(",") + 1 + bool(answers.trigger) - result.value("keep_tokens")
                     for caption in {picture.caption or "" for picture in scan.pictures}]
        num_texts = sum(1 if loose <= 1 else kept.value + 1 for loose in num_loose)
        size = f", about {num_texts * FULL_TEXT_VALUES * value_bytes / 1e6:.0f} MB on disk" if (
            base.num_unet_parameters > FULL_MODEL_PARAMETERS) else ""
        reason = f"at most {num_texts} texts in all are encoded and kept{size}"
    by_you = "set by you; " if "caption_variants" in result.overrides else ""
    result.values["caption_variants"] = Derived(kept.value, kept.rule, by_you + reason)


def _warn(result: Derivation, answers: Answers, scan: Scan, base: BaseModel, gpu: Gpu) -> None:
    num_pictures = len(scan.pictures)
    low, high = COUNT_RANGE[answers.subject]
    if not low <= num_pictures <= high:
        result.warn("DATA-COUNT", f"{num_pictures} pictures; a {answers.subject} set should have {low} to {high}.")
    small = [p for p in scan.pictures if p.width * p.height < result.value("resolution") ** 2 * 0.8]
    if small:
        result.warn("CROP", f"{len(small)} of {num_pictures} pictures are smaller than the base's "
                            f"{result.value('resolution')}x{result.value('resolution')} (first: {small[0].path.name}); "
                            f"they train in smaller buckets and teach less detail.")
    without = [p for p in scan.pictures if p.caption is None]
    if without and not answers.trigger:
        result.warn("TAG-TRIGGER", f"{len(without)} pictures have no caption and there is no trigger word: they are "
                                   f"learned as {class_word_for(answers)!r} in general.")
    if not answers.trigger:
        result.warn("TAG-TRIGGER", "No trigger word: the LoRA will act whenever it is loaded. "
                                   "A rare made-up word gives you a switch.")
    if result.value("alpha") > result.value("rank"):
        result.warn("ALPHA-HALF", f"alpha {result.value('alpha'):g} is above rank {result.value('rank')}: permitted, "
                                  f"likely to give an unexpected LoRA.")
    if gpu.vram_gib and result.value("mixed_precision") == "bf16" and not gpu.has_bf16:
        result.warn("PREC-MIXED", f"mixed_precision is bf16, which {gpu.name} does not have: the run will be refused there. "
                                  f"fp16 works.")
    _warn_of_optimizer(result, result.value("optimizer"))
    _warn_of_noise(result)
    _warn_of_blocks(result)
    warn_of_memory(result, base, gpu)
    if gpu.vram_gib == 0 and base.num_unet_parameters > FULL_MODEL_PARAMETERS:
        result.warn("COMMON", "There is no GPU here. A full-size SDXL takes minutes per step on a processor.")
    if gpu.note:
        result.warn("COMMON", gpu.note)


def _warn_of_blocks(result: Derivation) -> None:
    """Numbers for blocks in which nothing learns are ignored (BLOCK-ATTN); that is said."""
    conv = "conv" in result.value("targets")
    for name in BLOCK_BOUNDS:
        of_convolutions = name in ("conv_block_ranks", "conv_block_alphas", "block_rates")  # a rate is for all of a block
        with_layers = ATTENTION_BLOCKS if not conv else CONVOLUTION_BLOCKS if of_convolutions else RESNET_BLOCKS
        idle = sorted(set(result.overrides.get(name, {})) - set(with_layers))
        if idle:
            result.warn("BLOCK-ATTN", f"{name} names {', '.join(idle)}, where nothing takes it with targets = "
                                      f"{result.value('targets')!r}: ignored.")


def _warn_of_noise(result: Derivation) -> None:
    offset, iterations = result.value("noise_offset"), result.value("multires_noise_iterations")
    if offset and not 0.05 <= offset <= 0.15:
        result.warn("NOISE-OFFSET", f"noise_offset is {offset:g}; 0.05 to 0.15 is recommended.")
    if iterations and not 6 <= iterations <= 10:
        result.warn("NOISE-MULTIRES", f"multires_noise_iterations is {iterations}; 6 to 10 is recommended.")
    if result.overrides.get("text_encoder_stop_after", 1.0) < 1 and not text_encoders_learn(result):
        result.warn("", "text_encoder_stop_after is set, but the text encoders don't learn: ignored.")
    if offset and iterations:
        result.warn("NOISE-OFFSET", "noise_offset and multires noise both shift the brightness; one of them is enough.")


def _warn_of_optimizer(result: Derivation, optimizer: str) -> None:
    if optimizer in ADAPTIVE_OPTIMIZERS and result.value("alpha") > result.value("rank") / 2:
        result.warn("ALPHA-ADAPTIVE", f"With {optimizer}, alpha works best between 1 and half the rank.")
    if optimizer == "DAdaptAdam" and result.value("scheduler") != "constant":
        result.warn("OPT-DADAPT", "DAdaptAdam's scheduler must be constant: a rate that changes upsets its search.")
    if optimizer == "Adafactor" and result.value("scheduler") != "constant":
        result.warn("OPT-ADAFACTOR", "Adafactor adjusts its rate itself: learning_rate and scheduler are ignored.")
    if optimizer == "Lion":
        result.warn("OPT-LION", "Lion learns fast, is not fully proven and can add odd elements: AdamW is said to be better.")
