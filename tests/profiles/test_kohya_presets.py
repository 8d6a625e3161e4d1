"""kohya_ss presets as plans: one of each shape that its presets for SDXL have, and how a plan comes out of them."""

import json
from pathlib import Path

import pytest

from crumb.profiles.answers import Answers
from crumb.profiles.dataset import scan_pictures
from crumb.profiles.errors import RequestError
from crumb.profiles.kohya.importing import answers_of, conclude_import, translate
from crumb.profiles.kohya.reading import read_settings
from crumb.profiles.plan import SCHEDULERS, parse_plan

PRESET = json.loads((Path(__file__).parent / "kohya_preset.json").read_text())
"""The keys of a kohya_ss preset for SDXL, with values of our own."""

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
                    "additional_parameters": '--lr_scheduler_type "CosineAnnealingLR" --lr_scheduler_args "T_max=9" "eta=0"',
                    "max_train_steps": "150", "noise_offset_type": "Multires", "multires_noise_iterations": 5,
                    "multires_noise_discount": 0.1, "max_grad_norm": 1, "fp8_base": False, "use_scalar": False},
        {"steps": 150, "optimizer": "Prodigy", "loss_weighting": "min_snr", "multires_noise_iterations": 5, "noise_offset": 0.0,
         "optimizer_args": {"d0": 2e-5, "d_coef": 1.0, "weight_decay": 0.3, "decouple": True}, "rank": 32, "conv_rank": 16},
        ["LoRA_type", "network_dim", "network_alpha", "factor", "additional_parameters"]),
    "LoHa": (
        {"LoRA_type": "LyCORIS/LoHa", "conv_dim": 20, "conv_alpha": 10, "max_train_epochs": "40", "epoch": 1,
         "caption_dropout_rate": 0.05, "mixed_precision": "fp16", "log_with": "", "seed": ""},
        {"conv_rank": 20, "conv_alpha": 10.0, "targets": "attention+ff+conv", "seed": 42, "mixed_precision": "fp16"},
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
         "learning_rate": 0.0008, "unet_lr": 0.0008, "network_alpha": 1, "gradient_accumulation_steps": 3,
         "train_batch_size": 1},
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
               "logging_dir": "", "output_name": "", "sample_every_n_epochs": 0, "sample_every_n_steps": 0,
               "model_list": "custom", "sample_sampler": "euler_a", "save_model_as": "safetensors", "text_encoder_lr": 0.0,
               "bucket_reso_steps": 1,
               "max_timestep": None, "min_timestep": None},
        {"conv_rank": 40, "resolution": 512, "scheduler": "constant_with_warmup", "warmup_ratio": 0.08, "sample_every": 0},
        ["bucket_reso_steps"]),
    "LoHa without a mark of SDXL": (
        ADAPTIVE | OLD | {"LoRA_type": "LyCORIS/LoHa", "conv_dim": 8, "conv_alpha": 4, "optimizer": "Prodigy", "sdxl": None,
                          "training_comment": None, "additional_parameters": "--max_grad_norm=0", "use_wandb": None},
        {"conv_rank": 8, "conv_alpha": 4.0, "max_grad_norm": 0.0}, ["LoRA_type"]),
    "the newest GUI": (
        {"LoRA_type": "Kohya LoCon", "conv_dim": 16, "conv_alpha": 8, "clip_skip": 1, "flux1_checkbox": False, "ae": "",
         "guidance_scale": 3.5, "timestep_sampling": "sigma", "loss_type": "huber", "huber_c": 0.2,
         "huber_schedule": "constant", "huber_scale": 1, "ip_noise_gamma": 0.1, "max_train_steps": 1000, "max_train_epochs": 4,
         "lr_warmup": 0,
         "lr_warmup_steps": 0, "seed": 0, "loraplus_lr_ratio": 0, "masked_loss": False, "save_last_n_epochs": 2,
         "sample_prompts": "a cat --n dog --s 12 --l 5\n# not this\na hat", "huggingface_token": "hf_secret", "seed_note": ""},
        {"conv_rank": 16, "loss_type": "huber", "huber_c": 0.2, "huber_schedule": "constant", "input_perturbation": 0.1,
         "keep_checkpoints": 2, "sample_prompts": ["a cat", "a hat"], "sample_steps": 12, "sample_guidance": 5.0, "seed": 42},
        []),
    "DyLoRA": (
        {"LoRA_type": "Kohya DyLoRA", "unit": 4, "conv_dim": 8}, {"rank": 24, "conv_rank": 8}, ["LoRA_type", "unit"]),
}


def preset(**changes) -> dict:
    return {key: value for key, value in (PRESET | changes).items() if value is not None}


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
    with pytest.raises(RequestError, match=r"SGDNesterov.*--set optimizer=NAME"):
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
    path = write(preset(pretrained_model_name_or_path="gone.safetensors"), "preset.json")
    with pytest.raises(RequestError, match=r"Which pictures.*names none.*--images DIR"):
        answers_of(translate(read_settings(path)), Answers(base=str(tiny_base)))
    with pytest.raises(RequestError, match=r"Which base model.*'gone.safetensors', which is not here.*--base PATH"):
        answers_of(translate(read_settings(path)), Answers(images=str(photographs)))


def test_what_is_given_wins_over_what_the_file_names(write, conclude, photographs):
    path = write(preset(pretrained_model_name_or_path="gone.safetensors", output_name="theirs", vae="gone.vae"), "preset.json")
    translation, interview = conclude(path, name="ours")
    told = {left.key: left.reason for left in translation.missing}
    assert told["pretrained_model_name_or_path"] == "--base gives another"
    assert told["output_name"] == "--name gives another" and interview.plan.name == "ours"
    assert "the base's own is used" in told["vae"] and interview.plan.vae == ""
    _, interview = conclude(write(preset(output_name="a/b: c", train_data_dir=str(photographs)), "preset.json"), images="")
    assert interview.plan.name == "a-b- c" and interview.plan.images == str(photographs)


def test_the_base_is_believed_before_the_preset(write, conclude, tmp_path, tiny_base):
    _, interview = conclude(write(preset(v_parameterization=True), "preset.json"))
    assert interview.plan.prediction_type == "v_prediction", "the base does not say"
    named = tmp_path / "other-vpred.safetensors"
    named.write_bytes(tiny_base.read_bytes())
    _, interview = conclude(write(preset(), "preset.json"), base=str(named))
    assert interview.plan.prediction_type == "epsilon", "the preset says so, though the file's name hints otherwise"
