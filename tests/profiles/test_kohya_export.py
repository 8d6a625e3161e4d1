"""A plan as sd-scripts' settings and back: the same values of all that both know, and a word on the rest."""

import tempfile
import tomllib
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from crumb.profiles.errors import RequestError
from crumb.profiles.kohya.exporting import export_plan
from crumb.profiles.kohya.folders import picture_folders
from crumb.profiles.kohya.importing import ANSWERS, translate
from crumb.profiles.kohya.reading import read_settings
from crumb.profiles.kohya.table import KNOWN_KEYS
from crumb.profiles.optimizers import ADAPTIVE_OPTIMIZERS, OPTIMIZER_ARGS
from crumb.profiles.plan import Plan, plan_fields

TEXT = st.text(st.characters(min_codepoint=32, blacklist_categories=("Cs", "Cc", "Zs", "Zl", "Zp")), min_size=1, max_size=20)
RATIO = st.floats(0, 0.9)

SIMPLE = {
    "name": st.from_regex(r"[A-Za-z0-9][\w.-]{0,20}[A-Za-z0-9]", fullmatch=True), "seed": st.integers(0, 2**31 - 1),
    "vae": st.just("") | TEXT, "prediction_type": st.sampled_from(["epsilon", "v_prediction"]),
    "zero_terminal_snr": st.booleans(),
    "class_word": TEXT, "resolution": st.integers(1, 32).map(lambda n: 64 * n), "buckets": st.booleans(),
    "upscale": st.booleans(), "repeats": st.integers(1, 10_000), "rank": st.integers(1, 1024), "alpha": st.floats(0.1, 1024),
    "conv_alpha": st.floats(0.1, 1024), "steps": st.integers(1, 1_000_000), "batch_size": st.integers(1, 64),
    "gradient_accumulation_steps": st.integers(1, 1024), "mixed_precision": st.sampled_from(["no", "fp16", "bf16"]),
    "gradient_checkpointing": st.booleans(), "max_grad_norm": st.floats(0, 1000), "noise_offset": st.floats(0, 1),
    "multires_noise_iterations": st.integers(0, 64), "multires_noise_discount": st.floats(0, 1),
    "input_perturbation": st.floats(0, 1), "timestep_min": st.integers(0, 499), "timestep_max": st.integers(500, 1000),
    "loss_type": st.sampled_from(["l2", "huber", "smooth_l1"]), "huber_c": st.floats(1e-4, 10),
    "huber_schedule": st.sampled_from(["constant", "exponential", "snr"]), "warmup_ratio": st.floats(0, 1),
    "loss_weighting": st.sampled_from(["none", "min_snr", "debiased"]), "min_snr_gamma": st.floats(0.1, 100),
    "save_precision": st.sampled_from(["float", "fp16", "bf16"]), "save_every": st.integers(0, 1000),
    "keep_checkpoints": st.integers(1, 1000), "judge_every": st.integers(0, 1000), "sample_every": st.integers(0, 1000),
    "sample_prompts": st.lists(TEXT, max_size=3), "sample_steps": st.integers(1, 200), "sample_guidance": st.floats(1, 30),
    "held_out_pictures": st.sampled_from([0, 3]), "timestep_sampling": st.sampled_from(["uniform", "logit_normal"]),
    # Below: settings that a plan may have or not.
    "rank_dropout": RATIO, "module_dropout": RATIO, "network_dropout": RATIO, "max_norm": st.floats(0, 10),
    "lora_plus_ratio": st.floats(1, 64), "shuffle_captions": st.booleans(), "keep_tokens": st.integers(0, 8),
    "caption_dropout": RATIO, "tag_dropout": RATIO, "max_token_length": st.sampled_from([75, 150, 225]), "flip": st.booleans(),
    "prior_loss_weight": st.floats(0, 10), "text_encoder_learning_rate": st.floats(1e-6, 0.09),
    "text_encoder_2_learning_rate": st.floats(1e-6, 0.09), "masked_loss": st.sampled_from(["off", "alpha"]),
}


@st.composite
def plans(draw) -> Plan:
    """Valid plans; what the plan forbids together is not drawn."""
    values = {name: draw(strategy) for name, strategy in SIMPLE.items() if name in plan_fields()}
    scheduler = draw(st.sampled_from(plan_fields()["scheduler"].metadata["choices"]))
    optimizer = draw(st.sampled_from(plan_fields()["optimizer"].metadata["choices"]))
    names = draw(st.lists(st.sampled_from(OPTIMIZER_ARGS[optimizer]), unique=True))
    arguments = {name: draw(st.lists(RATIO, min_size=2, max_size=2)) if name == "betas" else
                 draw(st.booleans() | st.integers(-5, 5) | st.floats(-1e6, 1e6)) for name in names}
    conv_rank = draw(st.integers(0, 1024))
    targets = "attention+ff+conv" if conv_rank else draw(st.sampled_from(["attention", "attention+ff"]))
    adaptive = optimizer in ADAPTIVE_OPTIMIZERS
    if adaptive:
        values |= {name: 1.0 for name in values if name.startswith("text_encoder")}
    try:
        return Plan(**values | {
            "created": "2026-01-02T03:04:05+00:00", "base_model": "/no/base.safetensors", "images": "/no/pictures",
            "scheduler": scheduler, "optimizer": optimizer, "optimizer_args": arguments, "conv_rank": conv_rank,
            "targets": targets, "learning_rate": draw(st.floats(0.1, 10) if adaptive else st.floats(1e-9, 0.1)),
        })
    except RequestError:
        assume(False)


def without_effect(plan: Plan) -> set[str]:
    """Settings that this plan itself does not use, so that sd-scripts need not hold them."""
    unused = {"conv_alpha"} if not plan.conv_rank else set()
    unused |= {"min_snr_gamma"} if plan.loss_weighting != "min_snr" else set()
    unused |= {"warmup_ratio"} if plan.scheduler == "constant" else set()
    unused |= {"keep_checkpoints", "save_every"} if not plan.save_every else set()
    unused |= {"judge_every"} if not plan.judge_every else set()
    unused |= {"sample_prompts", "sample_steps", "sample_guidance", "sample_negative"} if not plan.sample_prompts else set()
    return unused


def read_back(plan: Plan, folder: Path) -> dict:
    export = export_plan(plan)
    for path, text in export.files(folder / "kohya.toml").items():
        path.write_text(text, encoding="utf-8")
    translation = translate(read_settings(folder / "kohya.toml"))
    names = {answer: name for name, answer in ANSWERS.items()}
    return translation.overrides | {names[answer]: value for answer, value in translation.answers.items()}


@settings(max_examples=150, deadline=None)
@given(plan=plans())
def test_there_and_back(plan):
    with tempfile.TemporaryDirectory() as folder:
        again = read_back(plan, Path(folder))
    export = export_plan(plan)
    told = {left.key for left in (*export.missing, *export.ignored)}
    for name in set(plan_fields()) - told - without_effect(plan):
        value = getattr(plan, name)
        if name not in again and value in ([], {}, plan_fields()[name].default):  # left out, and so the default on return
            continue
        assert again[name] == value and type(again[name]) is type(value), name
    expected = {name for name in ("held_out_pictures", "timestep_sampling")
                if getattr(plan, name) != plan_fields()[name].default}
    assert {left.key for left in export.missing} - {"targets", "trigger"} == expected


REQUIRED = {"name": "cat", "created": "2026-01-02T03:04:05+00:00", "base_model": "/m/b.safetensors", "images": "/p"}


def make_plan(**values) -> Plan:
    return Plan(**REQUIRED | values)


def test_what_sd_scripts_lacks_is_told():
    plan = make_plan(targets="attention", trigger="ohwx", class_word="cat", held_out_pictures=4, skip_broken=True,
                     timestep_sampling="logit_normal", logit_mean=0.3)
    export = export_plan(plan)
    told = {left.key: left.reason for left in export.missing}
    assert told.keys() == {"targets", "trigger", "held_out_pictures", "skip_broken", "timestep_sampling"}
    assert all(told.values()), "each with a reason"
    assert {"created", "vram_gib", "logit_mean"} <= {left.key for left in export.ignored}
    (subset,) = export.datasets["datasets"][0]["subsets"]
    assert subset["class_tokens"] == "ohwx cat", "shown where a caption is missing"


def test_the_files_are_ones_that_sd_scripts_reads(tmp_path):
    """Its parser takes any section; its dataset schema takes these keys alone (library/config_util.py)."""
    plan = make_plan(images=str(tmp_path), sample_prompts=["a cat -- at \"home\""], optimizer="Prodigy", learning_rate=1.0,
                     optimizer_args={"betas": [0.9, 0.99], "decouple": True}, conv_rank=4, targets="attention+ff+conv",
                     scheduler="constant_with_warmup")
    texts = export_plan(plan).files(tmp_path / "out.toml")
    assert [path.name for path in texts] == ["out.toml", "out-dataset.toml", "out-prompts.toml"]
    main, dataset, prompts = map(tomllib.loads, texts.values())
    flat = {key: value for section in main.values() for key, value in section.items()}
    assert flat.keys() <= KNOWN_KEYS | {"network_args"}
    assert flat["optimizer_args"] == ["betas=0.9,0.99", "decouple=True"]
    assert flat["network_args"][:2] == ["conv_dim=4", "conv_alpha=1.0"]
    assert flat["dataset_config"] == str(tmp_path / "out-dataset.toml")
    assert flat["network_train_unet_only"] is True, "left out, sd-scripts would train the text encoders too"
    assert flat["lr_warmup_steps"] == 0.1 and flat["max_train_steps"] == 1000
    (one,) = dataset["datasets"]
    assert one.keys() <= {"batch_size", "bucket_no_upscale", "bucket_reso_steps", "enable_bucket", "max_bucket_reso",
                          "min_bucket_reso", "resolution", "subsets"}
    (subset,) = one["subsets"]
    assert subset.keys() <= {"image_dir", "num_repeats", "class_tokens", "caption_extension", "shuffle_caption", "keep_tokens",
                             "caption_dropout_rate", "caption_tag_dropout_rate", "caption_prefix", "caption_suffix", "flip_aug",
                             "alpha_mask", "is_reg"}
    assert prompts["prompt"]["subset"] == [{"prompt": "a cat -- at \"home\"", "seed": 42}]
    assert prompts["prompt"]["width"] == plan.resolution
    assert next(iter(texts.values())).startswith("# A crumb plan for sd-scripts")


@pytest.mark.parametrize(("steps", "rates", "stop", "expected", "told"), [
    (100, (1e-5, 2e-5), 1.0, (1e-5, 2e-5), False), (100, (1e-5, 0.0), 0.5, (1e-5, 0.0), True),
    (100, (1e-5, 2e-5), 0.0, (0.0, 0.0), False), (100, (1e-5, 2e-5), 0.004, (0.0, 0.0), False),  # not one step
    (100, (0.0, 0.0), 0.5, (0.0, 0.0), False)])
def test_text_encoders_that_never_learn_are_left_out(tmp_path, steps, rates, stop, expected, told):
    """sd-scripts has no stop: what ends before the first step is network_train_unet_only, what ends later is told."""
    plan = make_plan(steps=steps, text_encoder_learning_rate=rates[0], text_encoder_2_learning_rate=rates[1],
                     text_encoder_stop_after=stop)
    export = export_plan(plan)
    written = export.settings["optimizer"]
    assert written.get("text_encoder_lr") == (list(expected) if any(expected) else None)
    assert written.get("network_train_unet_only", False) is not any(expected)
    assert ("text_encoder_stop_after" in {left.key for left in export.missing}) == told
    again = read_back(plan, tmp_path)
    assert (again["text_encoder_learning_rate"], again["text_encoder_2_learning_rate"]) == expected


@pytest.mark.parametrize("of_blocks", [
    {"block_ranks": {"IN08": 3}}, {"block_alphas": {"MID": 2.5}}, {"conv_block_ranks": {"IN01": 6, "MID": 1}},
    {"conv_block_alphas": {"OUT02": 3.0}},
    {"block_ranks": {"IN08": 3}, "block_alphas": {"MID": 2.5}, "conv_block_ranks": {"IN01": 6},
     "conv_block_alphas": {"MID": 3.0}}])
def test_numbers_of_blocks_go_there_and_back(tmp_path, of_blocks):
    """sd-scripts counts 23: the embeddings, nine down, three in the middle, nine up, the output; each list wants others."""
    plan = make_plan(rank=8, alpha=4.0, targets="attention+ff+conv", conv_rank=2, conv_alpha=1.0, **of_blocks)
    written = dict(text.split("=", 1) for text in export_plan(plan).settings["network"]["network_args"])
    lists = {key: value.split(",") for key, value in written.items() if key.endswith(("dims", "alphas"))}
    assert "block_dims" in lists and all(len(values) == 23 for values in lists.values())
    assert ("conv_block_dims" in lists) == any(name.startswith("conv") for name in of_blocks)
    if len(of_blocks) == 4:
        assert lists == {"block_dims": ["8"] * 9 + ["3"] + ["8"] * 13,
                         "block_alphas": ["4.0"] * 10 + ["2.5"] * 3 + ["4.0"] * 10,
                         "conv_block_dims": ["2", "2", "6"] + ["2"] * 20,
                         "conv_block_alphas": ["1.0"] * 10 + ["3.0"] * 3 + ["1.0"] * 10}
    again = read_back(plan, tmp_path)
    for name in ("block_ranks", "block_alphas", "conv_block_ranks", "conv_block_alphas"):
        assert again.get(name, {}) == of_blocks.get(name, {}), name
    assert (again["conv_rank"], again["conv_alpha"], again["targets"]) == (2, 1.0, "attention+ff+conv")


@pytest.mark.parametrize("values", [{"scheduler": "constant"}, {"save_every": 0}, {"judge_every": 0}])
def test_what_would_stop_sd_scripts_is_not_written(values):
    """It divides by these steps, and refuses a warm-up with `constant`."""
    written = {key: value for section in export_plan(make_plan(**values)).settings.values() for key, value in section.items()}
    if "scheduler" in values:
        assert "lr_warmup_steps" not in written
    assert all(written.get(key, 1) for key in ("save_every_n_steps", "validate_every_n_steps"))
    assert "save_last_n_steps" not in written or "save_every_n_steps" in written


def test_folders_with_repeats_go_there_and_back(tmp_path):
    """sd-scripts reads only the very folder that it is given, crumb all below it."""
    for name in ("pictures/3_cat", "pictures/5_dog", "pictures/.hidden", "pictures/notes"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("3_cat/a.jpg", "5_dog/b.PNG", "5_dog/b.txt", ".hidden/c.jpg"):
        (tmp_path / "pictures" / name).write_bytes(b"")
    pictures = tmp_path / "pictures"
    assert picture_folders(pictures) == {pictures / "3_cat": 3, pictures / "5_dog": 5}
    plan = make_plan(images=str(pictures), repeats=2)
    subsets = export_plan(plan).datasets["datasets"][0]["subsets"]
    assert [(Path(subset["image_dir"]).name, subset["num_repeats"]) for subset in subsets] == [("3_cat", 6), ("5_dog", 10)]
    (pictures / "notes").rmdir()
    again = read_back(plan, tmp_path)
    assert (again["images"], again["repeats"]) == (str(pictures), 2)


@pytest.mark.skipif("subsets" not in plan_fields(), reason="the plan has no subsets yet")
def test_further_folders_go_there_and_back(tmp_path):
    for name in ("a/cats", "b/dogs", "c/others"):
        (tmp_path / name).mkdir(parents=True)
    plan = make_plan(images=str(tmp_path / "a/cats"), class_word="cat", regularization=str(tmp_path / "c/others"),
                     subsets=[{"images": str(tmp_path / "b/dogs"), "repeats": 4, "class_word": "dog", "flip": True}])
    again = read_back(plan, tmp_path)
    assert again["subsets"] == plan.subsets
    assert (again["images"], again["regularization"]) == (plan.images, plan.regularization)
