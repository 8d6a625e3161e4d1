"""Derived values against the guide's rules, written from the guide by hand."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crumb.profiles.answers import SUBJECTS, Answers
from crumb.profiles.base_model import BaseModel
from crumb.profiles.dataset import Scan
from crumb.profiles.derive import derive
from crumb.profiles.hardware import resolve_gpu
from crumb.profiles.optimizers import OPTIMIZERS
from crumb.profiles.pictures import Mask, Picture
from crumb.profiles.plan import Plan, plan_fields

BASE = BaseModel(Path("sdxl.safetensors"), "single_file", "fp16", "epsilon", "", False, True, 2_567_463_684, 1024)


def scan(num_pictures: int, size=(1024, 1024), repeats=1) -> Scan:
    pictures = [Picture(Path(f"{n}.png"), *size, repeats, f"a photo {n}", None) for n in range(num_pictures)]
    return Scan(Path("pictures"), pictures, [])


def derived(gpu="RTX 3060", num_pictures=20, vram_gib=None, **answers):
    answers = Answers(images="pictures", base="sdxl.safetensors", trigger="ohwx", gpu=gpu, vram_gib=vram_gib, **answers)
    return derive(answers, scan(num_pictures), BASE, resolve_gpu(gpu, vram_gib))


@pytest.mark.parametrize(("gpu", "mixed", "rule_words"), [
    ("RTX 4090", "bf16", "best choice"),
    ("RTX 3060 12GB", "bf16", "best choice"),
    ("RTX 2060", "fp16", "older than RTX 30"),
    ("GTX 1660 SUPER", "fp16", "older than RTX 30"),
    ("cpu", "no", "fp32"),
])
def test_precision(gpu, mixed, rule_words):
    value = derived(gpu).values["mixed_precision"]
    assert (value.value, value.rule) == (mixed, "PREC-MIXED") and rule_words in value.reason


@pytest.mark.parametrize(("subject", "look", "num_pictures", "vram_gib", "rank", "alpha"), [
    ("character", "realistic", 20, 12, 32, 16),
    ("character", "anime", 20, 12, 16, 8),
    ("style", "realistic", 50, 12, 64, 32),
    ("style", "realistic", 100, 24, 128, 64),     # RANK-RAISE: 100 images or more
    ("style", "anime", 200, 12, 64, 32),
    ("concept", "realistic", 60, 12, 32, 16),
    ("style", "realistic", 200, 12, 64, 32),      # RANK-RANGE: higher rank, more VRAM
    ("style", "realistic", 200, 8, 32, 16),
])
def test_rank_and_alpha(subject, look, num_pictures, vram_gib, rank, alpha):
    result = derived(subject=subject, look=look, num_pictures=num_pictures, vram_gib=vram_gib)
    assert (result.value("rank"), result.value("alpha")) == (rank, alpha)


def test_optimizer_rules():
    prodigy = derived("RTX 4090")
    assert prodigy.value("optimizer") == "Prodigy" and prodigy.value("scheduler") == "constant"
    assert prodigy.value("learning_rate") == 1.0 and prodigy.value("alpha") <= prodigy.value("rank") / 2
    assert prodigy.value("optimizer_args") == {
        "decouple": True, "weight_decay": 0.01, "d_coef": 2.0, "use_bias_correction": True, "safeguard_warmup": False,
        "betas": [0.9, 0.999]}
    small = derived("RTX 3070")
    assert (small.value("optimizer"), small.value("scheduler"), small.value("warmup_ratio")) == (
        "AdamW8bit", "constant_with_warmup", 0.1)


def test_other_optimizers_come_with_the_guides_settings():
    dadapt = derived(overrides={"optimizer": "DAdaptAdam"})
    assert (dadapt.value("learning_rate"), dadapt.value("scheduler")) == (1.0, "constant")
    assert dadapt.value("optimizer_args") == {"decouple": True, "weight_decay": 0.01, "betas": [0.9, 0.999]}
    for overrides, rule in [({"optimizer": "DAdaptAdam", "alpha": 32.0}, "ALPHA-ADAPTIVE"),
                            ({"optimizer": "DAdaptAdam", "scheduler": "constant_with_warmup"}, "OPT-DADAPT"),
                            ({"optimizer": "Adafactor", "scheduler": "constant_with_warmup"}, "OPT-ADAFACTOR"),
                            ({"optimizer": "Lion"}, "OPT-LION")]:
        assert rule in [warning["rule"] for warning in derived(overrides=overrides).warnings], overrides


def test_what_varying_captions_cost_is_said():
    """20 captions of one tag behind a trigger word can't be shuffled; of three tags each is nine texts of 0.3 MB in bf16."""
    assert "each is encoded once" in derived().values["caption_variants"].reason
    assert "20 texts in all" in derived(overrides={"shuffle_captions": True}).values["caption_variants"].reason
    pictures = [replace(picture, caption=f"a, b, c{n}") for n, picture in enumerate(scan(20).pictures)]
    answers = Answers(images="p", base="b", trigger="ohwx", gpu="RTX 3070", overrides={"tag_dropout": 0.1})
    reason = derive(answers, replace(scan(20), pictures=pictures), BASE, resolve_gpu("RTX 3070", None)).values[
        "caption_variants"].reason
    assert "180 texts in all" in reason and "57 MB" in reason  # 180 x (77 x 2048 + 1280) x 2 bytes
    learning = derived(overrides={"shuffle_captions": True, "text_encoder_learning_rate": 1e-5})
    assert "encoded anew" in learning.values["caption_variants"].reason
    assert (derived().value("keep_tokens"), derived(overrides={"keep_tokens": 3}).value("keep_tokens")) == (1, 3)


def test_numbers_for_blocks_without_layers_are_said_to_be_ignored():
    for overrides, words in [({"block_ranks": {"IN08": 8}}, ""), ({"block_ranks": {"IN01": 8, "MID": 4}}, "IN01"),
                             ({"block_ranks": {"IN01": 8}, "targets": "attention+ff+conv", "conv_rank": 4}, ""),
                             ({"block_ranks": {"IN03": 8}, "targets": "attention+ff+conv", "conv_rank": 4}, "IN03"),
                             ({"block_rates": {"IN03": 0}, "targets": "attention+ff+conv", "conv_rank": 4}, ""),
                             ({"conv_block_ranks": {"IN03": 8}, "targets": "attention+ff+conv", "conv_rank": 4}, ""),
                             ({"conv_block_alphas": {"IN00": 8}, "targets": "attention+ff+conv", "conv_rank": 4}, "IN00"),
                             ({"block_rates": {"OUT08": 0}}, "OUT08")]:
        told = " ".join(w["text"] for w in derived(overrides=overrides).warnings if w["rule"] == "BLOCK-ATTN")
        assert (words in told) and bool(words) == bool(told), overrides


def test_noise_is_off_and_its_ranges_are_the_guides():
    assert (derived().value("noise_offset"), derived().value("multires_noise_iterations")) == (0.0, 0)
    assert derived(num_pictures=20).value("multires_noise_discount") == 0.3
    assert derived(num_pictures=150).value("multires_noise_discount") == 0.8
    for overrides, rules in [({"noise_offset": 0.1}, []), ({"noise_offset": 0.3}, ["NOISE-OFFSET"]),
                             ({"multires_noise_iterations": 8}, []), ({"multires_noise_iterations": 20}, ["NOISE-MULTIRES"]),
                             ({"multires_noise_iterations": 8, "noise_offset": 0.1}, ["NOISE-OFFSET"])]:
        warned = [warning["rule"] for warning in derived(overrides=overrides).warnings]
        assert [rule for rule in warned if rule.startswith("NOISE")] == rules, overrides


def test_prodigy_with_warmup_gets_an_epoch_more():
    plain = derived("RTX 4090")
    warm = derived("RTX 4090", overrides={"scheduler": "constant_with_warmup"})
    assert warm.value("epochs") == plain.value("epochs") + 1
    assert warm.value("steps") > plain.value("steps")


def test_arithmetic_is_shown_and_right():
    steps = derived("RTX 3070", num_pictures=24).values["steps"]
    assert steps.value == 24 * 10 * 10
    assert "24 pictures x 10 repeats / batch 1 = 240 batches per epoch x 10 epochs = 2400" in steps.reason


def with_further(num_own: int, num_further: int, overrides: dict, caption="a photo", **changes):
    """A plan for 24 GiB whose further folder, subset 1, holds `num_further` pictures."""
    further = [replace(picture, path=Path(f"further {n}.png"), subset=1, caption=caption, **changes)
               for n, picture in enumerate(scan(num_further).pictures)]
    whole = replace(scan(num_own), pictures=scan(num_own).pictures + further)
    answers = Answers(images="pictures", base="sdxl.safetensors", trigger="ohwx", gpu="RTX 3070", overrides=overrides)
    return derive(answers, whole, BASE, resolve_gpu("RTX 3070", None))


def test_regularization_pictures_double_an_epoch_and_count_nowhere_else():
    """24 pictures are seen 10 times an epoch, so 240 views of regularization pictures come on top: 480 batches, not 240."""
    alone, beside = derived("RTX 3070", num_pictures=24), with_further(24, 60, {"regularization": "reg"})
    for name in ("repeats", "epochs", "rank", "held_out_pictures", "multires_noise_discount"):
        assert beside.value(name) == alone.value(name), name
    steps = beside.values["steps"]
    assert steps.value == 2 * alone.value("steps") == 4800
    assert ("(24 pictures x 10 repeats + 240 views of regularization pictures) / batch 1 = 480 batches per epoch x 10 epochs = "
            "4800") in steps.reason
    assert beside.values["regularization"].value == "reg" and beside.values["regularization"].rule == "REG"
    assert "60 pictures" in beside.values["regularization"].reason and beside.value("prior_loss_weight") == 1.0
    assert alone.values["regularization"].value == "" and alone.values["regularization"].rule == "REG"
    assert not [warning for warning in beside.warnings if warning["rule"] == "DATA-COUNT"], "60 more would be too many"
    as_subset = with_further(24, 60, {"subsets": [{"images": "reg", "regularization": True}]})
    assert as_subset.value("steps") == 4800
    assert not [warning for warning in beside.warnings if warning["rule"] == "REG"]
    called = with_further(24, 60, {"regularization": "reg"}, caption="OHWX person")
    assert "60 captions" in next(warning["text"] for warning in called.warnings if warning["rule"] == "REG")


def test_repeats_of_a_subsets_own():
    """30 pictures, seen 100 times each: 3000 views. 10 of them repeat 40 times, so an epoch has 20 x 10 + 10 x 40 = 600."""
    result = with_further(20, 10, {"subsets": [{"images": "more", "repeats": 40}]})
    assert (result.value("repeats"), result.value("epochs"), result.value("steps")) == (10, 5, 3000)
    assert "600 views of 30 pictures / batch 1 = 600 batches per epoch x 5 epochs = 3000" in result.values["steps"].reason
    assert with_further(20, 10, {"subsets": [{"images": "more"}]}).value("epochs") == 10


def test_flip_is_an_answer_with_a_reason():
    assert derived(flip=True).value("flip") is True and "mirrored" in derived(flip=True).values["flip"].reason
    assert derived().value("flip") is False and "text" in derived().values["flip"].reason


def test_buckets_and_masks_are_remarked_on():
    assert not [warning for warning in derived(num_pictures=24).warnings if warning["rule"] == "BUCKET"]
    result = with_further(24, 1, {"batch_size": 4, "subsets": [{"images": "more", "repeats": 3}]}, width=2048)
    single, short = [warning["text"] for warning in result.warnings if warning["rule"] == "BUCKET"]
    assert "further 0.png" in single and "3 of 4" in short
    masks = (Mask("alpha", Path("a.png")),)
    result = with_further(24, 2, {"subsets": [{"images": "more", "masked_loss": "alpha"}]}, masks=masks)
    assert not [warning for warning in result.warnings if "mask" in warning["text"]]
    result = with_further(24, 2, {"masked_loss": "alpha", "subsets": [{"images": "more"}]}, masks=masks)
    assert [warning for warning in result.warnings if "24 of 26 pictures that should have a mask" in warning["text"]]


@pytest.mark.parametrize(("subject", "num_pictures", "warned"), [
    ("character", 9, True), ("character", 10, False), ("character", 50, False), ("character", 51, True),
    ("style", 99, True), ("style", 100, False), ("concept", 49, True), ("concept", 50, False)])
def test_picture_count_warnings(subject, num_pictures, warned):
    rules = [warning["rule"] for warning in derived(subject=subject, num_pictures=num_pictures).warnings]
    assert ("DATA-COUNT" in rules) == warned


@pytest.mark.parametrize("gpu", ["RTX 4060", "RTX 3080", "RTX 3060 12GB", "RTX 4080", "RTX 4090", "RTX 5090", "A100 80GB"])
@pytest.mark.parametrize(("subject", "num_pictures"), [("character", 20), ("style", 200)])
def test_plans_fit_the_card_they_are_made_for(gpu, subject, num_pictures):
    """Weights, 3.8 GiB of activations a picture (0.65 recomputed), and 10 to 22 bytes per LoRA weight, added by hand."""
    result = derived(gpu, num_pictures, subject=subject)
    bytes_per_weight = {"AdamW8bit": 10, "AdamW": 16, "Prodigy": 22}[result.value("optimizer")]
    kept = 3.1 if result.value("int8_activations") else 3.8
    activations = (0.65 if result.value("gradient_checkpointing") else kept) * result.value("batch_size")
    weights = {"no": 4.78, "int8": 2.42, "nf4": 1.43}[result.value("quantize_base")]
    needed = weights + activations + 2.66e6 * result.value("rank") * bytes_per_weight / 2**30
    assert needed + 1 < result.value("vram_gib") and not any("VRAM" in warning["text"] for warning in result.warnings)


@pytest.mark.parametrize(("gpu", "vram_gib", "how"), [
    ("RTX 3060 12GB", None, "no"), ("RTX 4060", None, "no"), ("RTX 2060", None, "int8"), ("GTX 1650", None, "nf4")])
def test_the_base_is_kept_as_exact_as_the_card_allows(gpu, vram_gib, how):
    result = derived(gpu, vram_gib=vram_gib)
    assert result.value("quantize_base") == how, result.values["quantize_base"].reason
    assert not any("of VRAM" in warning["text"] for warning in result.warnings)


@pytest.mark.parametrize(("vram_gib", "recompute", "in_int8"), [(12, False, False), (10, False, True), (8, True, False)])
def test_activations_are_kept_where_they_fit_if_need_be_in_int8(vram_gib, recompute, in_int8):
    """4.8 of base, 0.8 of LoRA with its states, 1.2 in reserve, and 3.8, 3.1 or 0.65 GiB of activations."""
    result = derived(vram_gib=vram_gib, overrides={"rank": 32, "optimizer": "AdamW8bit"})
    found = result.value("gradient_checkpointing"), result.value("int8_activations")
    assert found == (recompute, in_int8), result.values["gradient_checkpointing"].reason
    by_hand = derived(vram_gib=vram_gib, overrides={"rank": 32, "gradient_checkpointing": True})
    assert not by_hand.value("int8_activations")


def test_cards_that_are_too_small_are_told():
    assert any("of VRAM, its base in nf4, and the card has 3 GiB" in warning["text"]
               for warning in derived("GTX 1650", vram_gib=3).warnings)
    assert any("of VRAM, its base in 16 bits" in warning["text"]
               for warning in derived("GTX 1650", overrides={"quantize_base": "no"}).warnings)


def test_what_was_set_by_hand_wins_and_moves_the_rest():
    result = derived(overrides={"rank": 48, "optimizer": "AdamW", "steps": 300})
    assert result.value("rank") == 48 and result.values["rank"].reason == "set by you"
    assert result.value("alpha") == 16 and result.value("learning_rate") == 1e-4
    assert result.value("steps") == 300 and result.value("save_every") == 25
    conv = derived(overrides={"conv_rank": 8})
    assert (conv.value("targets"), conv.value("conv_alpha")) == ("attention+ff+conv", 4.0)
    assert derived(overrides={"targets": "attention+ff+conv"}).value("conv_rank") > 0


@settings(deadline=None)
@given(subject=st.sampled_from(SUBJECTS), look=st.sampled_from(["realistic", "anime"]), count=st.integers(1, 5000),
       vram_gib=st.sampled_from([0, 4, 6, 8, 12, 16, 24, 80]), repeats=st.integers(1, 10),
       overrides=st.fixed_dictionaries({}, optional={
           "optimizer": st.sampled_from(OPTIMIZERS), "rank": st.integers(1, 1024),
           "scheduler": st.sampled_from(["constant", "constant_with_warmup"]), "batch_size": st.integers(1, 8),
           "conv_rank": st.integers(0, 64), "epochs": st.integers(1, 15), "gradient_accumulation_steps": st.integers(1, 8)}))
def test_no_answers_lead_to_an_invalid_plan(subject, look, count, vram_gib, repeats, overrides):
    answers = Answers(images="p", base="b", subject=subject, look=look, vram_gib=float(vram_gib), overrides=overrides)
    gpu = resolve_gpu("auto" if vram_gib else "cpu", float(vram_gib))
    result = derive(answers, scan(count, repeats=repeats), BASE, gpu)
    values = {name: value.value for name, value in result.values.items() if name in plan_fields()}
    plan = Plan(name="n", created="2026-01-01T00:00:00+00:00", base_model="b", images="p", **values)
    assert all(value.reason for value in result.values.values())
    assert 1 <= plan.rank <= 1024 and plan.alpha <= max(plan.rank, 1)


def test_a_stop_of_text_encoders_that_dont_learn_is_named():
    told = [warning["text"] for warning in derived(overrides={"text_encoder_stop_after": 0.5}).warnings]
    assert any("don't learn: ignored" in text for text in told)
