"""A plan that can't run is refused before anything is written, and `crumb plan` already says what it can know."""

from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from crumb.profiles import preflight as preflight_module
from crumb.profiles.answers import Answers
from crumb.profiles.errors import RequestError
from crumb.profiles.hardware import resolve_gpu
from crumb.profiles.interview import conclude
from crumb.profiles.preflight import preflight

UNET = "lora_unet_middle_block_1_proj_in"
ENCODER_1 = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
ENCODER_2 = "text_encoder_2.text_model.encoder.layers.0.mlp.fc1"  # as diffusers names it


@pytest.fixture
def plan_of(tiny_base, photographs):
    def of(**overrides):
        return conclude(Answers(images=str(photographs), base=str(tiny_base), subject="style", gpu="cpu", overrides=overrides))
    return of


def lora_file(path, *modules) -> str:
    save_file({f"{name}.lora_{part}.weight": torch.ones(2, 2) for name in modules for part in ("down", "up")}, path)
    return str(path)


def test_a_missing_tracker_is_told_with_the_plan_and_refused_before_the_run(plan_of, monkeypatch):
    interview = plan_of(trackers=["swanlab"])
    assert any("pip install swanlab" in warning["text"] for warning in interview.derivation.warnings)
    with pytest.raises(RequestError, match="pip install swanlab"):
        preflight(replace(interview.plan, device="cpu"))


def test_parts_of_a_lora_that_would_be_lost_are_named_with_the_mend(plan_of, tmp_path):
    path = lora_file(tmp_path / "old.safetensors", UNET, ENCODER_1, ENCODER_2)
    told = [warning["text"] for warning in plan_of(start_from=path, text_encoder_learning_rate=1e-5).derivation.warnings]
    assert [text for text in told if "old.safetensors" in text] == [
        "old.safetensors also changes a text encoder (1 modules), which does not learn here: that part is left out of the new "
        "file. Set text_encoder_2_learning_rate above 0 to keep it."]


@pytest.mark.parametrize(("modules", "words"), [
    ([ENCODER_1, ENCODER_2], "Set text_encoder_learning_rate"), (["model"], "whole models"), ([], "no tensors")])
def test_files_that_nothing_can_start_from_are_refused(plan_of, tmp_path, modules, words):
    path = lora_file(tmp_path / "a.safetensors", *modules)
    if modules == ["model"]:
        save_file({"model.diffusion_model.out.2.bias": torch.ones(4)}, path)
    with pytest.raises(RequestError, match=words):
        plan_of(start_from=path)


def test_a_path_from_here_holds_from_anywhere(plan_of, tmp_path, monkeypatch):
    lora_file(tmp_path / "old.safetensors", UNET)
    monkeypatch.chdir(tmp_path)
    assert plan_of(start_from="old.safetensors").plan.start_from == str(tmp_path / "old.safetensors")


def test_a_folder_that_is_not_there_is_named_by_its_setting(plan_of, photographs):
    with pytest.raises(RequestError, match=r'^regularization pictures: There is no folder "/nope"'):
        plan_of(regularization="/nope")
    with pytest.raises(RequestError, match=r'^subset 1: There is no folder "/nope"'):
        plan_of(subsets=[{"images": "/nope"}])


def test_pictures_that_cant_be_read_are_left_out_only_with_consent(tiny_base, tmp_path, make_plan):
    for name in ("torn", "whole"):
        Image.effect_noise((128, 128), 90).save(tmp_path / f"{name}.png")
    data = (tmp_path / "torn.png").read_bytes()
    (tmp_path / "torn.png").write_bytes(data[:len(data) // 2])
    settings = {"base_model": str(tiny_base), "images": str(tmp_path)}
    with pytest.raises(RequestError, match=r"1 of the pictures.*torn\.png.*skip-broken"):
        preflight(make_plan(skip_broken=False, **settings))
    facts = preflight(make_plan(skip_broken=True, **settings))
    assert [picture.path.name for picture in facts.scan.pictures] == ["whole.png"]


def test_what_the_machine_or_the_vae_cant_give_is_named(tiny_base, tmp_path, make_plan, monkeypatch):
    monkeypatch.setattr(preflight_module, "detect_gpu", lambda: None)
    Image.effect_noise((128, 128), 90).save(tmp_path / "a.png")
    settings = {"base_model": str(tiny_base), "images": str(tmp_path)}
    for wrong, words in [({"device": "cuda"}, "no NVIDIA GPU answers"), ({"device": "auto", "mixed_precision": "fp16"}, "fp16"),
                         ({"vae": str(tmp_path / "none.safetensors")}, "no VAE at"),
                         ({"vae": str(tiny_base)}, "not a VAE")]:
        with pytest.raises(RequestError, match=words):
            preflight(make_plan(**settings | wrong))
    assert len(preflight(make_plan(device="auto", **settings)).scan.pictures) == 1
    monkeypatch.setattr(preflight_module, "detect_gpu", lambda: resolve_gpu("RTX 2060"))
    with pytest.raises(RequestError, match=r'bf16.*RTX 2060 does not have.*"fp16"'):
        preflight(make_plan(**settings | {"device": "cuda", "mixed_precision": "bf16"}))
    assert preflight(make_plan(**settings | {"device": "cuda", "mixed_precision": "fp16"}))


def test_zero_terminal_snr_of_a_base_that_tells_noise_is_warned_of(plan_of):
    told = [warning["text"] for warning in plan_of(zero_terminal_snr=True).derivation.warnings]
    assert any("zero_terminal_snr is for" in text for text in told)
    assert not any("zero_terminal_snr is for" in warning["text"] for warning in plan_of().derivation.warnings)
