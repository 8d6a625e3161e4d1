"""sd-scripts and kohya_ss settings as plans: every preset's shape, every mapped key, every refusal."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from crumb.profiles.answers import Answers
from crumb.profiles.dataset import scan_pictures
from crumb.profiles.errors import RequestError
from crumb.profiles.kohya.importing import answers_of, conclude_import, translate
from crumb.profiles.kohya.reading import read_settings
from crumb.profiles.kohya.table import TABLE
from crumb.profiles.kohya.values import BLOCKS, KohyaFile, Later, Length, Untaken
from crumb.profiles.plan import SCHEDULERS, parse_plan, plan_fields

PRESET = json.loads((Path(__file__).parent / "kohya_preset.json").read_text())
"""The keys of a kohya_ss preset for SDXL; SHAPES say how the others differ."""

OLD = {key: None for key in ("conv_block_dims", "conv_block_alphas", "max_bucket_reso", "min_bucket_reso", "full_bf16",
                             "lr_scheduler_args", "max_train_steps", "v_pred_like_loss")} | {"conv_dims": "", "conv_alphas": ""}
"""Presets of 2023 lack some keys (None here) and name others differently."""

ADAPTIVE = {"learning_rate": 1.0, "unet_lr": 1.0, "text_encoder_lr": 1.0}
COSINE = "cosine" if "cosine" in SCHEDULERS else "constant"

SHAPES = {
    "LoKr of whole matrices": (
        ADAPTIVE | {"LoRA_type": "LyCORIS/LoKr", "LyCORIS_preset": "full", "network_dim": 100000, "conv_dim": 100000,
                    "network_alpha": 1, "factor": 6, "optimizer": "Prodigy", "debiased_estimation_loss": True,
                    "min_snr_gamma": 5, "optimizer_args": '"d0=2e-5" "d_coef=1.0" "weight_decay=0.3" "decouple=True"',
                    "additional_parameters": '--lr_scheduler_type "CosineAnnealingLR" --lr_scheduler_args "T_max=900" "eta_min=0"',
                    "max_train_steps": "150", "noise_offset_type": "Multires", "multires_noise_iterations": 5,
                    "multires_noise_discount": 0.1, "max_grad_norm": 1, "fp8_base": False, "use_scalar": False},
        {"steps": 150, "optimizer": "Prodigy", "loss_weighting": "min_snr", "multires_noise_iterations": 5, "noise_offset": 0.0,
         "optimizer_args": {"d0": 2e-5, "d_coef": 1.0, "weight_decay": 0.3, "decouple": True}, "rank": 32, "conv_rank": 16},
        ["LoRA_type", "network_dim", "network_alpha", "factor", "additional_parameters"]),
    "LoHa": (
        {"LoRA_type": "LyCORIS/LoHa", "conv_dim": 20, "conv_alpha": 10, "max_train_epochs": "40", "epoch": 1,
         "caption_dropout_rate": 0.05, "mixed_precision": "fp16", "log_with": "", "seed": ""},
        {"rank": 24, "conv_rank": 20, "conv_alpha": 10.0, "targets": "attention+ff+conv", "seed": 42, "mixed_precision": "fp16"},
        ["LoRA_type"]),
    "LoKr with dropouts": (
        ADAPTIVE | OLD | {"LoRA_type": "LyCORIS/LoKr", "conv_dim": 48, "conv_alpha": 48, "rank_dropout": 0.1,
                          "module_dropout": 0.2, "use_cp": True, "optimizer": "Prodigy", "min_snr_gamma": 9,
                          "noise_offset": 0.04, "noise_offset_type": "Multires", "multires_noise_iterations": 7,
                          "multires_noise_discount": 0.25},
        {"noise_offset": 0.0, "multires_noise_iterations": 7, "multires_noise_discount": 0.25, "min_snr_gamma": 9.0,
         "optimizer_args": {}, "learning_rate": 1.0},
        ["LoRA_type", "use_cp"]),
    "AdamW with fewer noise levels": (
        {"optimizer": "AdamW", "adaptive_noise_scale": 0.004, "noise_offset": 0.06, "min_timestep": 50, "max_timestep": 950,
         "caption_extension": ".words", "max_train_steps": "220", "epoch": 90},
        {"optimizer": "AdamW", "noise_offset": 0.06, "timestep_min": 50, "timestep_max": 950, "steps": 220},
        ["adaptive_noise_scale", "caption_extension"]),
    "Prodigy with a norm limit": (
        ADAPTIVE | {"optimizer": "Prodigy", "scale_weight_norms": 4, "bucket_reso_steps": 32,
                    "optimizer_args": "weight_decay=0.02 decouple=True d0=0.0002"},
        {"optimizer_args": {"weight_decay": 0.02, "decouple": True, "d0": 0.0002}},
        ["bucket_reso_steps"]),
    "a low rate for both": (
        {"optimizer": "AdamW", "learning_rate": 4e-05, "unet_lr": 4e-05, "text_encoder_lr": 4e-05, "bucket_no_upscale": False,
         "gradient_accumulation_steps": "2", "save_precision": "fp16", "max_train_epochs": "9", "network_alpha": 24},
        {"learning_rate": 4e-05, "upscale": True, "gradient_accumulation_steps": 2, "save_precision": "fp16", "alpha": 24.0},
        []),
    "Adafactor that finds its rate": (
        ADAPTIVE | {"optimizer": "Adafactor", "lr_scheduler": "adafactor", "additional_parameters": "--log_prefix=try",
                    "keep_tokens": 1, "network_dim": 96, "network_alpha": 96, "wandb_api_key": "", "train_on_input": False},
        {"optimizer": "Adafactor", "scheduler": "constant", "rank": 96, "optimizer_args": {}},
        ["learning_rate"]),
    "Adafactor at a fixed rate": (
        {"optimizer": "Adafactor", "optimizer_args": "scale_parameter=False relative_step=False warmup_init=False",
         "learning_rate": 0.0008, "unet_lr": 0.0008, "network_alpha": 1, "gradient_accumulation_steps": 3, "train_batch_size": 1},
        {"learning_rate": 0.0008, "alpha": 1.0, "gradient_accumulation_steps": 3, "batch_size": 1,
         "optimizer_args": {"scale_parameter": False, "relative_step": False, "warmup_init": False}},
        []),
    "AdamW8bit with an odd alpha": (
        {"network_alpha": 11, "xformers": "xformers", "train_batch_size": 3}, {"alpha": 11.0, "batch_size": 3}, []),
    "AdamW8bit along a cosine": (
        {"lr_scheduler": "cosine", "network_dim": 80, "network_alpha": 40, "noise_offset": 0.05, "keep_tokens": 1},
        {"rank": 80, "alpha": 40.0, "scheduler": COSINE, "noise_offset": 0.05}, []),
    "first of two phases": (
        OLD | {"optimizer": "AdamW", "use_cp": True, "save_last_n_steps_state": 1, "epoch": 6, "save_every_n_epochs": 1},
        {"optimizer": "AdamW"}, []),
    "second of two phases": (
        OLD | {"dim_from_weights": True, "lora_network_weights": "D:/loras\\first phase.safetensors", "max_train_epochs": "1"},
        {"rank": 24}, ["lora_network_weights", "dim_from_weights"]),
    "DAdaptAdam on the U-Net alone": (
        ADAPTIVE | OLD | {"optimizer": "DAdaptAdam", "additional_parameters": "--network_train_unet_only", "lr_warmup": 5,
                          "optimizer_args": '"decouple=True" "weight_decay=0.15" "betas=0.9,0.95" "growth_rate=1.05"',
                          "lr_scheduler": "cosine", "max_token_length": "225", "keep_tokens": 2, "use_wandb": True},
        {"optimizer": "DAdaptAdam", "warmup_ratio": 0.05,
         "optimizer_args": {"decouple": True, "weight_decay": 0.15, "betas": [0.9, 0.95], "growth_rate": 1.05}},
        []),
    "Prodigy with a scheduler of torch": (
        ADAPTIVE | {"optimizer": "Prodigy", "lr_scheduler": "cosine_with_restarts", "network_dim": 200, "network_alpha": 200,
                    "additional_parameters": '--lr_scheduler_type "CosineAnnealingLR" --lr_scheduler_args "T_max=20" '
                                             '--network_train_unet_only'},
        {"rank": 200, "alpha": 200.0, "learning_rate": 1.0}, ["additional_parameters"]),
    "clipping as a further parameter": (
        ADAPTIVE | {"optimizer": "Prodigy", "additional_parameters": "--max_grad_norm=0", "max_train_steps": "310",
                    "multires_noise_iterations": 8, "multires_noise_discount": 0.2, "noise_offset": 0.04,
                    "optimizer_args": "decouple=True weight_decay=0.4 betas=0.9,0.99 use_bias_correction=False"},
        {"max_grad_norm": 0.0, "steps": 310, "multires_noise_iterations": 0, "noise_offset": 0.04}, []),
    "LoCon with paths of its author": (
        OLD | {"LoRA_type": "LyCORIS/LoCon", "conv_dim": 40, "conv_alpha": 40, "max_resolution": "512,512", "lr_warmup": 8,
               "lr_scheduler": "constant_with_warmup", "pretrained_model_name_or_path": "someone/a-model", "train_data_dir": "",
               "logging_dir": "", "output_name": "", "sample_every_n_epochs": 0, "sample_every_n_steps": 0, "model_list": "custom",
               "sample_sampler": "euler_a", "save_model_as": "safetensors", "text_encoder_lr": 0.0, "bucket_reso_steps": 1,
               "max_timestep": None, "min_timestep": None},
        {"conv_rank": 40, "resolution": 512, "scheduler": "constant_with_warmup", "warmup_ratio": 0.08, "sample_every": 0},
        ["bucket_reso_steps"]),
    "LoHa without a mark of SDXL": (
        ADAPTIVE | OLD | {"LoRA_type": "LyCORIS/LoHa", "conv_dim": 8, "conv_alpha": 4, "optimizer": "Prodigy", "sdxl": None,
                          "training_comment": None, "additional_parameters": "--max_grad_norm=0", "use_wandb": None},
        {"conv_rank": 8, "conv_alpha": 4.0, "max_grad_norm": 0.0}, ["LoRA_type"]),
    "the newest GUI": (
        {"LoRA_type": "Kohya LoCon", "conv_dim": 16, "conv_alpha": 8, "clip_skip": 1, "flux1_checkbox": False, "ae": "",
         "guidance_scale": 3.5, "timestep_sampling": "sigma", "loss_type": "huber", "huber_c": 0.2, "huber_schedule": "constant",
         "huber_scale": 1, "ip_noise_gamma": 0.1, "max_train_steps": 1000, "max_train_epochs": 4, "lr_warmup": 0,
         "lr_warmup_steps": 0, "seed": 0, "loraplus_lr_ratio": 0, "masked_loss": False, "save_last_n_epochs": 2,
         "sample_prompts": "a cat --n dog --s 12 --l 5\n# not this\na hat", "huggingface_token": "hf_secret", "seed_note": ""},
        {"conv_rank": 16, "loss_type": "huber", "huber_c": 0.2, "huber_schedule": "constant", "input_perturbation": 0.1,
         "keep_checkpoints": 2, "sample_prompts": ["a cat", "a hat"], "sample_steps": 12, "sample_guidance": 5.0, "seed": 42},
        []),
    "DyLoRA": (
        {"LoRA_type": "Kohya DyLoRA", "unit": 4, "conv_dim": 8}, {"rank": 24, "conv_rank": 8}, ["LoRA_type", "unit"]),
}


@pytest.fixture(scope="module")
def scan(photographs):
    return scan_pictures(photographs)


@pytest.fixture
def write(tmp_path):
    """A settings file of the given content, by its ending."""
    def to_file(content, name="settings.toml") -> Path:
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path
    return to_file


def preset(**changes) -> dict:
    return {key: value for key, value in (PRESET | changes).items() if value is not None}


def file_of(*, gui=False, **settings) -> KohyaFile:
    return KohyaFile(Path("settings.toml"), gui, settings)


@pytest.fixture
def conclude(tiny_base, photographs, scan):
    """From a file to the plan, as the command goes; returns the translation too."""
    def run(path, **given):
        answers = Answers(**{"images": str(photographs), "base": str(tiny_base), "gpu": "RTX 3060 12GB"} | given)
        translation = translate(read_settings(path), answers.overrides)
        return translation, conclude_import(translation, answers_of(translation, answers), scan)
    return run


@pytest.mark.parametrize("shape", SHAPES)
def test_every_preset_imports(shape, write, conclude):
    changes, expected, missing = SHAPES[shape]
    translation, interview = conclude(write(preset(**changes), "preset.json"))
    plan = parse_plan(interview.toml())
    assert {name: getattr(plan, name) for name in expected} == expected
    assert set(missing) <= {left.key for left in translation.missing}
    assert "hf_secret" not in str(translation.ignored)
    keys = {key for taken in translation.taken for key in taken.kohya}
    keys |= {left.key for left in (*translation.missing, *translation.ignored)}
    lost = {key for key, value in preset(**changes).items() if value not in ("", None)} - keys
    assert lost <= {"additional_parameters", "use_wandb", "noise_offset_type"}, "every key must be in one of the three lists"


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
    "block_alphas": ({"block_alphas": ",".join(["1"] * 21 + ["3", "1"]), "network_alpha": 1}, {"block_alphas": {"OUT08": 3.0}}),
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

ELSEWHERE = {"subsets", "sample_prompts"}  # tested with the files that they come from


def test_every_mapped_key_has_its_test():
    assert {row.kohya[0] for row in TABLE if row.to_crumb} - ELSEWHERE == set(MAPPED)


@pytest.mark.parametrize("key", MAPPED)
def test_mapped(key):
    settings, expected = MAPPED[key]
    row = next(row for row in TABLE if row.kohya[:1] == (key,) and row.to_crumb)
    length = Length(steps=500, steps_per_epoch=25, num_pictures=200)
    found = row.to_crumb(file_of(**settings))
    assert {name: value.of(length) if isinstance(value, Later) else value for name, value in found.items()} == expected
    assert expected.keys() <= set(row.crumb)
    translation = translate(file_of(**settings))
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
    ({"network_module": "networks.lora"}, {"targets": "attention+ff", "conv_rank": 0}),
    ({"sample_every_n_steps": 5, "sample_every_n_epochs": 0}, {"sample_every": 5}),
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
    ({"clip_l_made_up": "x"}, "clip_l_made_up", "does not know"),
    ({"sample_prompts": "nowhere.txt"}, "sample_prompts", "no such file"),
])
def test_what_can_not_be_held_is_told(settings, key, words):
    (left,) = [left for left in translate(file_of(**settings)).missing if left.key == key]
    assert words in left.reason


@pytest.mark.parametrize(("key", "value", "words"), [
    ("block_dims", "1,2,3", "SDXL has 23"), ("block_alphas", ["x"] * 23, "no number"), ("up_lr_weight", "a,b", "no number"),
    ("network_weights", "/not/here.safetensors", "--set start_from"), ("reg_data_dir", "/not/here", "--set regularization"),
    ("flip_aug", "often", "neither true nor false"), ("text_encoder_lr", "nan", "no number"), ("keep_tokens", 1.5, "no whole"),
])
def test_what_no_plan_could_hold_is_told(key, value, words):
    row = next(row for row in TABLE if key in row.kohya and row.to_crumb)
    with pytest.raises(Untaken, match=words):
        row.to_crumb(file_of(**{key: value}))


def test_text_encoders_follow_the_general_rate_where_none_is_set():
    row = next(row for row in TABLE if "text_encoder_learning_rate" in row.crumb)
    both = ("text_encoder_learning_rate", "text_encoder_2_learning_rate")
    for settings, rates in (
        ({"learning_rate": 1e-4}, (1e-4, 1e-4)), ({"learning_rate": 1e-4, "network_train_unet_only": True}, (0.0, 0.0)),
        ({"learning_rate": 1e-4, "text_encoder_lr": 0.0}, (0.0, 0.0)), ({"text_encoder_lr": [2e-5]}, (2e-5, 2e-5)),
        ({"unet_lr": 1e-4, "text_encoder_lr": 0.0, "learning_rate": 1e-3, "gui": True}, (0.0, 0.0)),
        ({"unet_lr": 0.0, "text_encoder_lr": 0.0, "learning_rate": 1e-3, "gui": True}, (1e-3, 1e-3)),
    ):
        assert row.to_crumb(file_of(**settings)) == dict(zip(both, rates)), settings


def test_epochs_become_the_steps_that_kohya_makes(tmp_path, photographs, tiny_base):
    """Pictures x repeats / batch x epochs, with buckets off so that no batch is cut short."""
    folder = tmp_path / "5_person"
    folder.mkdir()
    for picture in photographs.iterdir():
        (folder / picture.name).write_bytes(picture.read_bytes())
    path = tmp_path / "settings.toml"
    path.write_text(f'train_data_dir = "{tmp_path}"\nmax_train_epochs = 4\ntrain_batch_size = 2\nlearning_rate = 1e-4\n'
                    "save_every_n_epochs = 2\nlr_scheduler = 'constant_with_warmup'\nlr_warmup_steps = 12\n"
                    "gradient_accumulation_steps = 3\n")
    translation = translate(read_settings(path))
    answers = answers_of(translation, Answers(base=str(tiny_base), gpu="cpu", overrides={"buckets": False, "upscale": True}))
    plan = conclude_import(translation, answers, scan_pictures(tmp_path)).plan
    assert (plan.steps, plan.repeats, plan.save_every) == (6 * 5 // 2 * 4 // 3, 1, 10)
    assert plan.warmup_ratio == 12 / 20
    assert plan.images == str(tmp_path)


def test_where_each_value_comes_from_is_said(write, conclude):
    translation, interview = conclude(write(preset(network_dim=20), "preset.json"), overrides={"alpha": 3.0})
    values = interview.derivation.values
    assert values["rank"].reason == "from preset.json (network_dim)"
    assert values["alpha"].reason == "set by you" and values["alpha"].value == 3.0
    assert values["epochs"].reason == "from preset.json (epoch)"
    assert values["save_every"].reason == "from preset.json (save_every_n_epochs)"
    assert values["save_every"].value == 3 * interview.plan.steps // 12
    assert values["steps"].rule == "COMMON", "steps follow from the epochs, and say how"
    assert [left.reason for left in translation.missing if left.key == "network_alpha"] == ["--set gives another"]
    assert "why: from preset.json (network_dim)" in interview.toml()


def test_alpha_above_the_rank_is_warned_of(write, conclude):
    _, interview = conclude(write(preset(network_dim=8, network_alpha=32), "preset.json"))
    assert any(warning["rule"] == "ALPHA-HALF" for warning in interview.derivation.warnings)


@pytest.mark.parametrize(("gpu", "given", "taken"), [("cpu", "fp16", "no"), ("cpu", "bf16", "bf16"),
                                                     ("RTX 2060", "bf16", "fp16"), ("RTX 3060 12GB", "bf16", "bf16")])
def test_a_precision_that_the_card_lacks_is_not_taken(gpu, given, taken, write, conclude):
    translation, interview = conclude(write(preset(mixed_precision=given), "preset.json"), gpu=gpu)
    assert interview.plan.mixed_precision == taken
    assert (given == taken) == ("mixed_precision" not in [left.key for left in translation.missing])


def test_an_optimizer_without_a_like_is_refused_until_another_is_set(write, conclude):
    path = write(preset(optimizer="SGDNesterov", optimizer_args="momentum=0.9"), "preset.json")
    with pytest.raises(RequestError, match="SGDNesterov.*--set optimizer=NAME"):
        conclude(path)
    translation, interview = conclude(path, overrides={"optimizer": "Lion"})
    assert interview.plan.optimizer == "Lion" and interview.plan.learning_rate == 2e-4
    assert {"optimizer", "optimizer_args"} <= {left.key for left in translation.missing}


def test_fixing_one_of_two_settings_that_say_the_same_decides_both(write, conclude):
    path = write(preset(LoRA_type="Kohya LoCon", conv_dim=8, max_train_steps=70), "preset.json")
    assert conclude(path, overrides={"conv_rank": 0})[1].plan.targets == "attention+ff"
    assert conclude(path, overrides={"targets": "attention"})[1].plan.conv_rank == 0
    assert conclude(path, overrides={"epochs": 2})[1].plan.steps != 70


def test_a_rate_that_suits_no_optimizer_is_refused_with_a_mend(write, conclude):
    path = write(preset(optimizer="AdamW", learning_rate=1.0, unet_lr=1.0), "preset.json")
    with pytest.raises(RequestError, match=r"preset.json makes no plan: learning_rate is 1 with AdamW.*--set KEY=VALUE"):
        conclude(path)


def test_paths_that_a_preset_lacks_must_be_given(write, tiny_base, photographs):
    translation = translate(read_settings(write(preset(pretrained_model_name_or_path="gone.safetensors"), "preset.json")))
    with pytest.raises(RequestError, match="Which pictures.*names none.*--images DIR"):
        answers_of(translation, Answers(base=str(tiny_base)))
    with pytest.raises(RequestError, match="Which base model.*'gone.safetensors', which is not here.*--base PATH"):
        answers_of(translation, Answers(images=str(photographs)))


def test_the_base_is_believed_before_the_preset(write, conclude, tmp_path, tiny_base):
    translation, interview = conclude(write(preset(v_parameterization=True), "preset.json"))
    assert interview.plan.prediction_type == "v_prediction", "the base does not say"
    named = tmp_path / "other-vpred.safetensors"
    named.write_bytes(tiny_base.read_bytes())
    translation, interview = conclude(write(preset(), "preset.json"), base=str(named))
    assert interview.plan.prediction_type == "epsilon", "the preset says so, though the file's name hints otherwise"


LORA = 'network_module = "networks.lora"\nnetwork_dim = 4\n'


@pytest.mark.parametrize(("name", "content", "words"), [
    ("a.toml", "network_dim = = 3", ["no valid TOML"]),
    ("a.json", "{'network_dim': 3}", ["no valid JSON"]),
    ("a.json", "[1, 2]", ["holds a list"]),
    ("a.json", "[" * 100_000, ["no valid JSON"]),
    ("a.toml", "network_dim = 4\0", ["no text"]),
    ("a.json", preset(sdxl=False, v2=True), ["Stable Diffusion 2", "crumb trains LoRA and LoCon for SDXL"]),
    ("a.json", preset(sdxl=False), ["Stable Diffusion 1.5"]),
    ("a.json", preset(LoRA_type="Flux1", flux1_checkbox=True, sdxl=False), ["another family", "flux1"]),
    ("a.json", preset(sd3_checkbox=True), ["another family"]),
    ("a.toml", 'network_module = "networks.lora_flux"', ["another family"]),
    ("a.toml", LORA + "discrete_flow_shift = 3.0", ["another family"]),
    ("a.json", preset(LoRA_type=None, network_dim=None), ["trains a whole model"]),
    ("a.json", preset(LoRA_type="LyCORIS/iA3"), ["LyCORIS/iA3", "crumb trains LoRA"]),
    ("a.json", preset(LoRA_type="LyCORIS/Native Fine-Tuning"), ["Native Fine-Tuning"]),
    ("a.toml", 'network_module = "networks.oft"', ["networks.oft", "crumb plan"]),
    ("a.toml", LORA + "learning_rate = 0.0", ["every learning rate"]),
    ("a.toml", LORA + "network_train_text_encoder_only = true\nlearning_rate = 1e-4", ["text encoders alone"]),
    ("a.json", preset(unet_lr=0, learning_rate=0, text_encoder_lr=1e-5), ["text encoders alone"]),
    ("a.toml", "plan_version = 1", ["crumb plan already"]),
    ("a.toml", 'colour = "red"\nshape = "round"', ["no settings file"]),
    ("a.json", {"hello": {"world": 1}}, ["no settings file"]),
    ("a.toml", LORA + 'dataset_config = "gone.toml"', ["gone.toml", "--dataset-config"]),
    ("a.toml", LORA + "datasets = 3", ["datasets"]),
    ("a.toml", LORA + "[[datasets]]\nsubsets = 3", ["datasets"]),
    ("a.toml", LORA + "[[datasets]]\n[[datasets.subsets]]\nis_reg = true", ["no folder of pictures"]),
    ("a.json", preset(sdxl="perhaps"), ["neither true nor false"]),
])
def test_bad_files_are_refused_in_words(name, content, words, write):
    with pytest.raises(RequestError) as caught:
        translate(read_settings(write(content, name)))
    assert caught.value.exit_code == 2
    for word in [name, *words]:
        assert word in str(caught.value)


def test_binary_missing_and_huge_files_are_refused(tmp_path):
    (tmp_path / "a.json").write_bytes(bytes(range(128, 256)))
    (tmp_path / "b.toml").write_bytes(b"#" * 5_000_000)
    for name, word in (("a.json", "no text"), ("b.toml", "too large"), ("c.toml", "no file"), ("", "can't be read")):
        with pytest.raises(RequestError, match=word):
            read_settings(tmp_path / name)


def test_dataset_files_win_over_the_settings(write, tmp_path):
    (tmp_path / "pictures").mkdir()
    write('[general]\nflip_aug = true\nresolution = 512\n[[datasets]]\nbatch_size = 3\nresolution = [768, 768]\n'
          '[[datasets.subsets]]\nimage_dir = "pictures"\nnum_repeats = 4\nclass_tokens = "a cat"\ncolor_aug = true\n'
          '[[datasets.subsets]]\nimage_dir = "rest"\nis_reg = true\n', "sets.toml")
    path = write(LORA + 'train_batch_size = 9\nresolution = "1024,1024"\n[section]\ndataset_config = "sets.toml"')
    translation = translate(read_settings(path))
    assert {key: translation.overrides[key] for key in ("batch_size", "resolution", "repeats")} == {
        "batch_size": 3, "resolution": 768, "repeats": 4}
    assert translation.answers["images"] == "pictures" and translation.answers["class_word"] == "a cat"
    told = {left.key: left.reason for left in translation.missing}
    assert "color_aug" in told and "image_dir of is_reg" in told
    elsewhere = write("[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'pictures'\nnum_repeats = 2", "other.toml")
    assert translate(read_settings(path, elsewhere)).overrides["repeats"] == 2
    with pytest.raises(RequestError, match="no dataset file"):
        read_settings(path, path)


def test_several_folders(write, tmp_path, tiny_base):
    """Sub-folders that crumb would find by itself are one folder; others need room in the plan, or a folder by hand."""
    for name in ("2_cat", "6_dog"):
        (tmp_path / "all" / name).mkdir(parents=True)
    datasets = ('[[datasets]]\n[[datasets.subsets]]\nimage_dir = "all/2_cat"\nnum_repeats = {}\nkeep_tokens = 1\n'
                '[[datasets.subsets]]\nimage_dir = "all/6_dog"\nnum_repeats = 18\nkeep_tokens = 2\n')
    whole = translate(read_settings(write(LORA + datasets.format(6))))
    assert whole.overrides["repeats"] == 3 and whole.answers["images"] == str(tmp_path / "all")
    assert ("keep_tokens", [1, 2]) in [(left.key, left.value) for left in whole.missing]
    apart = translate(read_settings(write(LORA + datasets.format(5))))
    assert apart.overrides["repeats"] == 5 and apart.answers["images"] == "all/2_cat"
    further = next(row for row in TABLE if "subsets" in row.crumb).to_crumb(apart.file)["subsets"]
    assert further == [{"images": str(tmp_path / "all/6_dog"), "repeats": 18}]
    given = answers_of(apart, Answers(images=str(tmp_path / "all"), base=str(tiny_base)))
    assert given.images == str(tmp_path / "all") and "subsets" not in given.overrides
    if "subsets" not in plan_fields():
        with pytest.raises(RequestError, match=r"2 folders.*N_name.*--images DIR"):
            answers_of(apart, Answers(base=str(tiny_base)))


@pytest.mark.parametrize(("name", "content"), [
    ("p.txt", "a cat --n dog --s 9 --l 4.5\n\n# a remark\na hat"),
    ("p.json", json.dumps([{"prompt": "a cat", "negative_prompt": "dog", "sample_steps": 9, "scale": 4.5}, {"prompt": "a hat"}])),
    ("p.toml", '[prompt]\nscale = 4.5\n[[prompt.subset]]\nprompt = "a cat"\nnegative_prompt = "dog"\nsample_steps = 9\n'
               '[[prompt.subset]]\nprompt = "a hat"'),
])
def test_prompts_are_read_from_their_file(name, content, write):
    write(content, name)
    file = read_settings(write(LORA + f'sample_prompts = "{name}"'))
    row = next(row for row in TABLE if row.kohya == ("sample_prompts",))
    assert row.to_crumb(file) == {"sample_prompts": ["a cat", "a hat"], "sample_steps": 9, "sample_guidance": 4.5,
                                  "sample_negative": "dog"}
    write("[" * 5000, name)
    if name != "p.txt":
        with pytest.raises(Untaken):
            row.to_crumb(file)


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
    "rank_dropout": 0.1, "module_dropout": 0.2, "network_dropout": 0.3, "max_norm": 2.0, "lora_plus_ratio": 8.0,
    "text_encoder_learning_rate": 1e-5, "text_encoder_2_learning_rate": 0.0, "shuffle_captions": True, "keep_tokens": 2,
    "caption_dropout": 0.1, "tag_dropout": 0.2, "caption_prefix": "ohwx,", "caption_suffix": "on film", "flip": True,
    "max_token_length": 150, "masked_loss": "alpha", "prior_loss_weight": 0.4, "trackers": ["wandb"], "start_from": __file__,
    "scheduler_cycles": 3, "scheduler_power": 2.0,
}


@pytest.mark.parametrize("name", UPCOMING)
def test_settings_that_a_plan_may_get_go_both_ways(name):
    """On the rows themselves, so that it holds before and after the plan has them."""
    plan = SimpleNamespace(rank=8, alpha=4.0, **UPCOMING)
    row = next(row for row in TABLE if name in row.crumb and row.to_kohya)
    written = {key: str(value) if row.place == "network_args" else value for key, value in row.to_kohya(plan).items()}
    assert row.to_crumb(file_of(network_dim=8, network_alpha=4.0, **written))[name] == UPCOMING[name]
    off = SimpleNamespace(rank=8, alpha=4.0, **{key: type(value)() for key, value in UPCOMING.items()} | {"lora_plus_ratio": 1.0})
    assert not {key for key, value in row.to_kohya(off).items() if value == UPCOMING[name]}


def test_blocks_are_counted_as_sd_scripts_counts_them():
    """0 is the embeddings, 1-9 the way down, 10-12 the middle, 13-21 the way up, 22 the output (networks/lora.py)."""
    row = next(row for row in TABLE if "block_ranks" in row.crumb)
    for block, position in (("IN00", 1), ("IN08", 9), ("MID", 11), ("OUT00", 13), ("OUT08", 21)):
        values = ["8"] * 23
        values[position] = "2"
        assert row.to_crumb(file_of(network_dim=8, block_dims=",".join(values))) == {"block_ranks": {block: 2}}
    assert len(BLOCKS) == 19 and dataclasses.is_dataclass(row)
