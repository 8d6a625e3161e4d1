"""The table between sd-scripts and crumb: each mapped key, its neighbours, and what is told of the rest."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest

from crumb.profiles.kohya.importing import translate
from crumb.profiles.kohya.table import TABLE
from crumb.profiles.kohya.values import BLOCKS, KohyaFile, Later, Length, Untaken
from crumb.profiles.plan import plan_fields


def file_of(*, gui=False, **settings) -> KohyaFile:
    return KohyaFile(Path("settings.toml"), gui, settings)


EIGHTS = ",".join(["8"] * 23)

MAPPED = {
    "pretrained_model_name_or_path": ({"pretrained_model_name_or_path": "x.safetensors"}, {"base_model": "x.safetensors"}),
    "vae": ({"vae": "v.safetensors"}, {"vae": "v.safetensors"}),
    "v_parameterization": ({"v_parameterization": True}, {"prediction_type": "v_prediction"}),
    "zero_terminal_snr": ({"zero_terminal_snr": True}, {"zero_terminal_snr": True}),
    "train_data_dir": ({"train_data_dir": "/d"}, {"images": "/d"}),
    "class_tokens": ({"class_tokens": "a cat"}, {"class_word": "a cat"}),
    "resolution": ({"resolution": "768,1024"}, {"resolution": 896}),
    "enable_bucket": ({"enable_bucket": False}, {"buckets": False}),
    "bucket_no_upscale": ({"bucket_no_upscale": False}, {"upscale": True}),
    "num_repeats": ({"num_repeats": 7}, {"repeats": 7}),
    "train_batch_size": ({"train_batch_size": "3"}, {"batch_size": 3}),
    "reg_data_dir": ({"reg_data_dir": str(Path(__file__).parent)}, {"regularization": str(Path(__file__).parent)}),
    "prior_loss_weight": ({"prior_loss_weight": 0.5}, {"prior_loss_weight": 0.5}),
    "alpha_mask": ({"alpha_mask": True}, {"masked_loss": "alpha"}),
    "flip_aug": ({"flip_aug": True}, {"flip": True}),
    "validation_split": ({"validation_split": 0.2}, {"held_out_pictures": 40}),
    "validate_every_n_steps": ({"validate_every_n_steps": 9}, {"judge_every": 9}),
    "shuffle_caption": ({"shuffle_caption": True}, {"shuffle_captions": True}),
    "keep_tokens": ({"keep_tokens": "2"}, {"keep_tokens": 2}),
    "caption_dropout_rate": ({"caption_dropout_rate": 0.1}, {"caption_dropout": 0.1}),
    "caption_tag_dropout_rate": ({"caption_tag_dropout_rate": 0.1}, {"tag_dropout": 0.1}),
    "caption_prefix": ({"caption_prefix": "ohwx"}, {"caption_prefix": "ohwx"}),
    "caption_suffix": ({"caption_suffix": "film"}, {"caption_suffix": "film"}),
    "max_token_length": ({"max_token_length": "225"}, {"max_token_length": 225}),
    "network_module": ({"network_module": "networks.lora"}, {"method": "lora"}),
    "network_dim": ({"network_dim": 6}, {"rank": 6}),
    "network_alpha": ({"network_alpha": 0, "network_dim": 6}, {"alpha": 6.0}),
    "conv_dim": ({"conv_dim": "6"}, {"conv_rank": 6, "targets": "attention+ff+conv"}),
    "conv_alpha": ({"conv_alpha": 2, "conv_dim": 6}, {"conv_alpha": 2.0}),
    "block_dims": ({"block_dims": ",".join(["8"] * 5 + ["16"] + ["8"] * 5 + ["4"] + ["8"] * 11), "network_dim": 8},
                   {"block_ranks": {"IN04": 16, "MID": 4}}),
    "block_alphas": ({"block_alphas": ",".join(["1"] * 21 + ["3", "1"]), "network_alpha": 1, "block_dims": EIGHTS},
                     {"block_alphas": {"OUT08": 3.0}}),
    "conv_block_dims": ({"conv_block_dims": "0,0,2,2,2,6" + ",2" * 17, "block_dims": EIGHTS},
                        {"conv_block_ranks": {"IN04": 6}}),
    "conv_block_alphas": ({"conv_block_alphas": "3" + ",1" * 9 + ",2,1,2" + ",1" * 10, "conv_block_dims": EIGHTS,
                           "mid_lr_weight": "1,1,1"}, {"conv_block_alphas": {"MID": 2.0}}),
    "down_lr_weight": ({"down_lr_weight": "0,1,1,1,.5,1,1,1,1", "mid_lr_weight": "1,2,1", "up_lr_weight": "linear"},
                       {"block_rates": {"IN00": 0.0, "IN04": 0.5, "MID": 2.0} | {f"OUT{i:02}": i / 8 for i in range(8)}}),
    "network_dropout": ({"network_dropout": 0.1}, {"network_dropout": 0.1}),
    "rank_dropout": ({"rank_dropout": 0.1}, {"rank_dropout": 0.1}),
    "module_dropout": ({"module_dropout": 0.1}, {"module_dropout": 0.1}),
    "scale_weight_norms": ({"scale_weight_norms": 2}, {"max_norm": 2.0}),
    "loraplus_lr_ratio": ({"loraplus_lr_ratio": 4}, {"lora_plus_ratio": 4.0}),
    "network_weights": ({"network_weights": __file__}, {"start_from": __file__}),
    "max_train_epochs": ({"max_train_epochs": 3, "max_train_steps": 90}, {"epochs": 3}),
    "gradient_accumulation_steps": ({"gradient_accumulation_steps": 2.0}, {"gradient_accumulation_steps": 2}),
    "mixed_precision": ({"mixed_precision": "bf16"}, {"mixed_precision": "bf16"}),
    "gradient_checkpointing": ({"gradient_checkpointing": False}, {"gradient_checkpointing": False}),
    "fp8_base": ({"fp8_base": True}, {"quantize_base": "int8"}),
    "seed": ({"seed": "7"}, {"seed": 7}),
    "optimizer_type": ({"optimizer_type": "bitsandbytes.optim.PagedAdamW8bit"}, {"optimizer": "AdamW8bit"}),
    "optimizer_args": ({"optimizer_type": "Lion", "optimizer_args": ["betas=0.9,0.9", "eps=1"]},
                       {"optimizer_args": {"betas": [0.9, 0.9]}}),
    "learning_rate": ({"learning_rate": 1e-3, "unet_lr": 1e-4}, {"learning_rate": 1e-4}),
    "text_encoder_lr": ({"text_encoder_lr": [1e-5, 2e-5]},
                        {"text_encoder_learning_rate": 1e-5, "text_encoder_2_learning_rate": 2e-5}),
    "stop_text_encoder_training_pct": ({"stop_text_encoder_training_pct": 30}, {"text_encoder_stop_after": 0.3}),
    "lr_scheduler": ({"lr_scheduler": "constant_with_warmup"}, {"scheduler": "constant_with_warmup"}),
    "lr_warmup": ({"lr_warmup_steps": 50}, {"warmup_ratio": 0.1}),
    "lr_scheduler_num_cycles": ({"lr_scheduler_num_cycles": "3"}, {"scheduler_cycles": 3}),
    "lr_scheduler_power": ({"lr_scheduler_power": 2}, {"scheduler_power": 2.0}),
    "max_grad_norm": ({"max_grad_norm": "0.5"}, {"max_grad_norm": 0.5}),
    "noise_offset": ({"noise_offset": 0.1}, {"noise_offset": 0.1}),
    "multires_noise_iterations": ({"multires_noise_iterations": 6}, {"multires_noise_iterations": 6}),
    "multires_noise_discount": ({"multires_noise_discount": 0.8}, {"multires_noise_discount": 0.8}),
    "ip_noise_gamma": ({"ip_noise_gamma": 0.1}, {"input_perturbation": 0.1}),
    "min_timestep": ({"min_timestep": 10}, {"timestep_min": 10}),
    "max_timestep": ({"max_timestep": 990}, {"timestep_max": 990}),
    "loss_type": ({"loss_type": "smooth_l1"}, {"loss_type": "smooth_l1"}),
    "huber_c": ({"huber_c": 0.3}, {"huber_c": 0.3}),
    "huber_schedule": ({"huber_schedule": "exponential"}, {"huber_schedule": "exponential"}),
    "min_snr_gamma": ({"debiased_estimation_loss": True}, {"loss_weighting": "debiased"}),
    "output_name": ({"output_name": "mine"}, {"name": "mine"}),
    "save_precision": ({"save_precision": "float"}, {"save_precision": "float"}),
    "save_every_n_steps": ({"save_every_n_epochs": 2}, {"save_every": 50}),
    "save_last_n_epochs": ({"save_every_n_steps": 10, "save_last_n_steps": 30}, {"keep_checkpoints": 4}),
    "sample_every_n_steps": ({"sample_every_n_steps": 11}, {"sample_every": 11}),
    "log_with": ({"log_with": "all"}, {"trackers": ["tensorboard", "wandb"]}),
}
"""One row of the table each, by its first key: settings that only this row explains, and what they must become."""

ELSEWHERE = {"datasets.subsets", "sample_prompts"}  # tested with the files that they come from


def test_every_mapped_key_has_its_test():
    assert {row.kohya[0] for row in TABLE if row.to_crumb} - ELSEWHERE == set(MAPPED)


@pytest.mark.parametrize("key", MAPPED)
def test_mapped(key):
    given_ones, expected = MAPPED[key]
    row = next(row for row in TABLE if row.kohya[:1] == (key,) and row.to_crumb)
    length = Length(steps=500, steps_per_epoch=25, num_pictures=200)
    found = row.to_crumb(file_of(**given_ones))
    assert {name: value.of(length) if isinstance(value, Later) else value for name, value in found.items()} == expected
    assert expected.keys() <= set(row.crumb)
    translation = translate(file_of(**given_ones))
    reached = set(translation.overrides) | {name for taken in translation.taken for name in taken.crumb}
    there = {name for name in expected if name in plan_fields() or name == "epochs"}
    assert there <= reached
    if not there:
        assert key in str(translation.missing), "a setting that the plan lacks must be named"


@pytest.mark.parametrize(("settings", "expected"), [
    ({"max_train_steps": 90, "epoch": 3}, {"steps": 90}),
    ({"max_train_steps": 0, "max_train_epochs": 0}, {}),
    ({"max_train_steps": 0, "epoch": 3, "gui": True}, {"epochs": 3, "repeats": 1}),
    ({"max_train_steps": 90, "epoch": 3, "gui": True}, {"steps": 90}),
    ({"lr_warmup_steps": 0.2}, {"warmup_ratio": 0.2}),
    ({"lr_warmup_steps": "25%"}, {"warmup_ratio": 0.25}),
    ({"lr_warmup": 4, "gui": True}, {"warmup_ratio": 0.04}),
    ({"stop_text_encoder_training_pct": 0}, {"text_encoder_stop_after": 1.0}),
    ({"stop_text_encoder_training_pct": -1}, {"text_encoder_stop_after": 0.0}),
    ({"stop_text_encoder_training": -1}, {"text_encoder_stop_after": 0.0}),
    ({"stop_text_encoder_training": 0}, {"text_encoder_stop_after": 1.0}),
    ({"resolution": 1000}, {"resolution": 1024}),
    ({"network_dim": "16", "network_alpha": "0.0"}, {"rank": 16, "alpha": 16.0}),
    ({"optimizer_type": "Prodigy", "learning_rate": 1e-4}, {"learning_rate": 1.0, "optimizer": "Prodigy"}),
    ({"learning_rate": 1e-4}, {"optimizer": "AdamW"}),
    ({"use_8bit_adam": True}, {"optimizer": "AdamW8bit"}),
    ({"optimizer_type": "Lion8bit"}, {"optimizer": "Lion"}),
    ({"learning_rate": "0.0", "unet_lr": "0.0003"}, {"learning_rate": 3e-4}),
    ({"loss_type": "l1"}, {"loss_type": "smooth_l1"}),
    ({"min_snr_gamma": 5, "debiased_estimation_loss": True}, {"loss_weighting": "min_snr", "min_snr_gamma": 5.0}),
    ({"network_module": "lycoris.kohya", "algo": "locon", "preset": "attn-only"}, {"targets": "attention", "conv_rank": 0}),
    ({"network_module": "lycoris.kohya", "algo": "lora", "network_dim": 12}, {"targets": "attention+ff+conv", "conv_rank": 12}),
    ({"network_module": "lycoris.kohya", "preset": "attn-mlp", "block_dims": EIGHTS, "conv_block_dims": EIGHTS},
     {"targets": "attention+ff", "conv_rank": 0, "conv_block_ranks": {}}),
    ({"network_module": "networks.lora"}, {"targets": "attention+ff", "conv_rank": 0}),
    ({"sample_every_n_steps": 5, "sample_every_n_epochs": 0}, {"sample_every": 5}),
    ({"conv_dim": 4, "conv_alpha": 2, "block_dims": EIGHTS, "conv_block_dims": "8,8,4" + ",8" * 20},
     {"conv_rank": 4, "targets": "attention+ff+conv", "conv_alpha": 2.0,
      "conv_block_ranks": {name: 8 for name in BLOCKS if name != "IN01"}}),
    ({"up_lr_weight": "1,1,1,1,1,1,1,1,.5", "conv_block_dims": "8,8,4" + ",8" * 20},  # neither conv_dim nor conv_alpha
     {"conv_rank": 8, "targets": "attention+ff+conv", "conv_alpha": 1.0, "conv_block_ranks": {"IN01": 4}}),
    ({"block_dims": "0,0,2,2,0,4,8,0,8,8" + ",8" * 13, "conv_block_dims": "0,0" + ",2" * 21, "network_dim": 8},
     {"block_ranks": {"IN01": 2, "IN02": 2, "IN04": 4}, "conv_block_ranks": {}}),
    ({"block_dims": "0,0,0,0,0,4,8,0,8,8" + ",8" * 13, "network_dim": 8}, {"block_ranks": {"IN04": 4}}),
    ({"block_dims": EIGHTS, "conv_block_dims": "0" + ",0" * 22, "conv_block_alphas": EIGHTS, "conv_dim": 4},
     {"targets": "attention+ff", "conv_rank": 0, "conv_block_ranks": {}, "conv_block_alphas": {}}),
])
def test_neighbours_change_a_keys_meaning(settings, expected):
    overrides = translate(file_of(**settings)).overrides
    assert {name: overrides[name] for name in expected} == expected


@pytest.mark.parametrize(("settings", "key", "words"), [
    ({"optimizer_type": "Prodigy", "learning_rate": 1e-4}, "learning_rate", "so 1"),
    ({"lr_scheduler": "rex"}, "lr_scheduler", "no rex"),
    ({"min_snr_gamma": 5, "debiased_estimation_loss": True}, "min_snr_gamma", "one way at a time"),
    ({"optimizer_type": "Lion", "optimizer_args": ["foo=1"]}, "optimizer_args", "foo=1"),
])
def test_what_is_mapped_to_the_nearest_says_so(settings, key, words):
    assert words in next(taken.note for taken in translate(file_of(**settings)).taken if key in taken.kohya)


@pytest.mark.parametrize(("settings", "key", "words"), [
    ({"network_dim": 5000}, "network_dim", "between 1 and 1024"),
    ({"seed": 2**40}, "seed", "between"),
    ({"resolution": "big"}, "resolution", "no number"),
    ({"enable_bucket": "often"}, "enable_bucket", "neither true nor false"),
    ({"optimizer_type": "Lion", "optimizer_args": ["betas=none"]}, "optimizer_args", "no number, true or false"),
    ({"color_aug": True}, "color_aug", "own colours"),
    ({"a_new_key": 3}, "a_new_key", "does not know"),
    ({"block_dims": EIGHTS, "conv_block_dims": "8,8,0" + ",8" * 20}, "conv_block_dims", "gives IN01 0"),
    ({"block_dims": EIGHTS.replace("8", "0", 6), "network_dim": 8}, "block_dims", "gives IN04 0"),
    ({"clip_l_made_up": "x"}, "clip_l_made_up", "does not know"),
    ({"sample_prompts": "nowhere.txt"}, "sample_prompts", "no such file"),
])
def test_what_can_not_be_held_is_told(settings, key, words):
    (left,) = [left for left in translate(file_of(**settings)).missing if left.key == key]
    assert words in left.reason


@pytest.mark.parametrize(("key", "value", "words"), [
    ("block_dims", "1,2,3", "SDXL has 23"), ("up_lr_weight", "a,b", "no number"),
    ("network_weights", "/not/here.safetensors", "--set start_from"), ("reg_data_dir", "/not/here", "--set regularization"),
    ("flip_aug", "often", "neither true nor false"), ("text_encoder_lr", "nan", "no number"), ("keep_tokens", 1.5, "no whole"),
])
def test_what_no_plan_could_hold_is_told(key, value, words):
    row = next(row for row in TABLE if key in row.kohya and row.to_crumb)
    with pytest.raises(Untaken, match=words):
        row.to_crumb(file_of(**{key: value}))


@pytest.mark.parametrize(("key", "beside"), [
    ("block_alphas", {}), ("conv_block_dims", {"conv_dim": 4}),
    ("conv_block_alphas", {"conv_dim": 4, "block_dims": EIGHTS, "network_dim": 8})])
def test_lists_by_block_that_sd_scripts_does_not_read_change_nothing(key, beside):
    """networks/lora.py: all want block_dims or a block's weight beside them, the convolutions' alphas also their ranks."""
    translation = translate(file_of(**{key: EIGHTS}, **beside))
    without = translate(file_of(**beside))
    assert translation.overrides == without.overrides and not translation.missing
    assert "reads it only beside" in next(left.reason for left in translation.ignored if left.key == key)


@pytest.mark.parametrize("fixed", [{"conv_rank": 0}, {"targets": "attention"}])
def test_who_switches_the_convolutions_off_needs_no_numbers_for_them(fixed):
    lists = {"conv_block_dims": EIGHTS, "conv_block_alphas": EIGHTS}
    translation = translate(file_of(block_dims=EIGHTS, network_dim=8, conv_dim=4, **lists), fixed)
    assert not {"conv_block_ranks", "conv_block_alphas"} & set(translation.overrides)
    assert set(lists) <= {left.key for left in translation.missing}


def test_text_encoders_follow_the_general_rate_where_none_is_set():
    row = next(row for row in TABLE if "text_encoder_learning_rate" in row.crumb)
    both = ("text_encoder_learning_rate", "text_encoder_2_learning_rate")
    for given_ones, rates in (
        ({"learning_rate": 1e-4}, (1e-4, 1e-4)), ({"learning_rate": 1e-4, "network_train_unet_only": True}, (0.0, 0.0)),
        ({"learning_rate": 1e-4, "text_encoder_lr": 0.0}, (0.0, 0.0)), ({"text_encoder_lr": [2e-5]}, (2e-5, 2e-5)),
        ({"unet_lr": 1e-4, "text_encoder_lr": 0.0, "learning_rate": 1e-3, "gui": True}, (0.0, 0.0)),
        ({"unet_lr": 0.0, "text_encoder_lr": 0.0, "learning_rate": 1e-3, "gui": True}, (1e-3, 1e-3)),
    ):
        assert row.to_crumb(file_of(**given_ones)) == dict(zip(both, rates)), given_ones


def test_the_table_is_whole():
    """Every setting of the plan stands in it, no key of kohya's in two rows, and each row can explain itself."""
    assert set(plan_fields()) <= {name for row in TABLE for name in row.crumb}
    keys = [key for row in TABLE for key in row.kohya]
    assert len(keys) == len(set(keys))
    for row in TABLE:
        assert row.kohya or row.crumb
        assert row.reason or row.to_crumb, row
        if set(row.crumb) - set(plan_fields()) - {"epochs", "sample_negative"} and row.kohya:
            assert row.reason, f"{row.crumb} is not in the plan: say what happens instead"


UPCOMING = {
    "block_ranks": {"IN04": 16, "MID": 4}, "block_alphas": {"OUT03": 2.0}, "block_rates": {"IN07": 0.5, "MID": 0.0},
    "conv_block_ranks": {"IN01": 6, "MID": 3}, "conv_block_alphas": {"IN03": 2.0},
    "rank_dropout": 0.1, "module_dropout": 0.2, "network_dropout": 0.3, "max_norm": 2.0, "lora_plus_ratio": 8.0,
    "text_encoder_learning_rate": 1e-5, "text_encoder_2_learning_rate": 0.0, "shuffle_captions": True, "keep_tokens": 2,
    "caption_dropout": 0.1, "tag_dropout": 0.2, "caption_prefix": "ohwx,", "caption_suffix": "on film", "flip": True,
    "max_token_length": 150, "masked_loss": "alpha", "prior_loss_weight": 0.4, "trackers": ["wandb"], "start_from": __file__,
    "scheduler_cycles": 3, "scheduler_power": 2.0,
}


@pytest.mark.parametrize("name", UPCOMING)
def test_settings_that_a_plan_may_get_go_both_ways(name):
    """On the rows themselves, so that it holds before and after the plan has them."""
    general = {"rank": 8, "alpha": 4.0, "conv_rank": 2, "conv_alpha": 1.0, "num_text_steps": 100}
    plan = SimpleNamespace(**general, **UPCOMING)
    row = next(row for row in TABLE if name in row.crumb and row.to_kohya)
    written = {key: str(value) if row.place == "network_args" else value for key, value in row.to_kohya(plan).items()}
    assert row.to_crumb(file_of(**{"network_dim": 8, "network_alpha": 4.0, "conv_dim": 2}, **written))[name] == UPCOMING[name]
    nothing = {key: type(value)() for key, value in UPCOMING.items()}
    off = SimpleNamespace(**general | nothing | {"lora_plus_ratio": 1.0, "num_text_steps": 0})
    assert not {key for key, value in row.to_kohya(off).items() if value == UPCOMING[name]}


def test_blocks_are_counted_as_sd_scripts_counts_them():
    """0 is the embeddings, 1-9 the way down, 10-12 the middle, 13-21 the way up, 22 the output (networks/lora.py)."""
    row = next(row for row in TABLE if "block_ranks" in row.crumb)
    for block, position in (("IN00", 1), ("IN08", 9), ("MID", 11), ("OUT00", 13), ("OUT08", 21)):
        values = ["8"] * 23
        values[position] = "2"
        assert row.to_crumb(file_of(network_dim=8, block_dims=",".join(values))) == {"block_ranks": {block: 2}}
    convolutions = next(row for row in TABLE if "conv_block_ranks" in row.crumb)
    for block, positions in (("IN01", (2,)), ("IN06", (7,)), ("MID", (10, 12)), ("OUT02", (15,)), ("OUT08", (21,))):
        values = ["8"] * 23
        for position in positions:  # the middle's second holds no 3x3 convolution
            values[position] = "2"
        file = file_of(block_dims=EIGHTS, conv_dim=8, conv_block_dims=",".join(values))
        assert convolutions.to_crumb(file) == {"conv_block_ranks": {block: 2}} and not file.remarks
    values[12] = "4"
    file = file_of(block_dims=EIGHTS, conv_dim=8, conv_block_dims=",".join(values))
    assert convolutions.to_crumb(file) == {"conv_block_ranks": {"OUT08": 2}} and "first of its two" in file.remarks[0]
    assert len(BLOCKS) == 19 and dataclasses.is_dataclass(row)
