"""Every kind of bad request gives exit code 2, a sentence that names the mend, and leaves everything as it was."""

import json
import shutil
import struct
from pathlib import Path

import pytest
from PIL import Image

from crumb.wizard.cli import main

LDM = "model.diffusion_model."


def write_safetensors(path: Path, names: list[str]) -> Path:
    """A sound file of 4-element tensors, recognised by their names alone."""
    header = json.dumps({
        name: {"dtype": "F16", "shape": [4], "data_offsets": [8 * i, 8 * i + 8]} for i, name in enumerate(names)
    }).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8 * len(names)))
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys, *arguments: str) -> str:
    """Runs a command that must be refused in words; returns the sentence."""
    code = main(list(arguments))
    captured = capsys.readouterr()
    assert code == 2, captured
    assert captured.err.startswith("crumb: ") and "Traceback" not in captured.err, captured.err
    return captured.err


def without_picture_folder(folder, base, photographs):
    return ["--images", str(folder / "nowhere")], "no folder"


def empty_folder(folder, base, photographs):
    (folder / "empty").mkdir()
    return ["--images", str(folder / "empty")], "no picture"


def truncated_picture(folder, base, photographs):
    shutil.copytree(photographs, folder / "cut")
    whole = (folder / "cut/coffee.jpg").read_bytes()
    (folder / "cut/coffee.jpg").write_bytes(whole[: len(whole) // 2])
    return ["--images", str(folder / "cut")], "--skip-broken"


def missing_base(folder, base, photographs):
    return ["--base", str(folder / "none.safetensors")], "check the path"


def sd15_base(folder, base, photographs):
    names = [f"{LDM}input_blocks.0.0.weight", "cond_stage_model.transformer.text_model.embeddings.position_ids"]
    return ["--base", str(write_safetensors(folder / "sd15.safetensors", names))], "SD 1.5"


def lora_as_base(folder, base, photographs):
    names = ["lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight"]
    return ["--base", str(write_safetensors(folder / "lora.safetensors", names))], "a LoRA"


def truncated_base(folder, base, photographs):
    (folder / "half.safetensors").write_bytes(base.read_bytes()[:100_000])
    return ["--base", str(folder / "half.safetensors")], "half.safetensors"


def pickled_base(folder, base, photographs):
    (folder / "old.ckpt").write_bytes(b"PK\x03\x04" + bytes(100))
    return ["--base", str(folder / "old.ckpt")], "safetensors"


def missing_vae(folder, base, photographs):
    return ["--vae", str(folder / "vae.safetensors")], "There is no VAE at"


def model_as_vae(folder, base, photographs):
    return ["--vae", str(base)], "not a VAE"


def unknown_gpu(folder, base, photographs):
    return ["--gpu", "RTX 9999"], "--gpu auto"


def impossible_vram(folder, base, photographs):
    return ["--vram", "-3"], "--vram 8"


def trigger_of_two(folder, base, photographs):
    return ["--trigger", "cat, dog"], "comma"


def unfit_name(folder, base, photographs):
    return ["--name", "../up"], "Use letters"


def unknown_setting(folder, base, photographs):
    return ["--set", "rnak=8"], "'rank'"


def setting_of_wrong_type(folder, base, photographs):
    return ["--set", "rank=many"], "whole number"


def setting_out_of_range(folder, base, photographs):
    return ["--set", "rank=4096"], "between 1 and 1024"


def setting_without_value(folder, base, photographs):
    return ["--set", "rank"], "KEY=VALUE"


def setting_that_is_an_answer(folder, base, photographs):
    return ["--set", "images=elsewhere"], "--images"


def settings_that_disagree(folder, base, photographs):
    return ["--set", "optimizer=AdamW", "--set", "learning_rate=1"], "1e-4"


def subset_with_unknown_key(folder, base, photographs):
    return ["--subset", f"images={photographs},repaets=2"], "Did you mean 'repeats'"


def subset_without_folder(folder, base, photographs):
    return ["--subset", "repeats=2"], "images is missing"


def missing_regularization_folder(folder, base, photographs):
    return ["--set", "regularization=nowhere"], "no folder"


def regularization_with_the_very_pictures(folder, base, photographs):
    return ["--set", f"regularization={photographs}"], "another of the folders"


def black_mask(folder, base, photographs):
    shutil.copytree(photographs, folder / "masked")
    Image.new("L", Image.open(folder / "masked/coffee.jpg").size).save(folder / "masked/coffee-masklabel.png")
    return ["--images", str(folder / "masked"), "--set", "masked_loss=files"], "black all over"


def flip_as_a_setting(folder, base, photographs):
    return ["--set", "flip=true"], "--flip"


@pytest.mark.parametrize("mistake", [
    subset_with_unknown_key, subset_without_folder, missing_regularization_folder, regularization_with_the_very_pictures,
    black_mask, flip_as_a_setting, without_picture_folder,
    empty_folder, truncated_picture, missing_base, sd15_base, lora_as_base, truncated_base,
    pickled_base, missing_vae, model_as_vae, unknown_gpu, impossible_vram, trigger_of_two, unfit_name, unknown_setting,
    setting_of_wrong_type, setting_out_of_range, setting_without_value, setting_that_is_an_answer, settings_that_disagree,
], ids=lambda mistake: mistake.__name__)
def test_a_wrong_request_is_refused_before_anything_is_written(mistake, folder, tiny_base, photographs, capsys):
    wrong, words = mistake(folder, tiny_base, photographs)
    before = sorted(folder.rglob("*"))
    sentence = refused(capsys, "plan", "--images", str(photographs), "--base", str(tiny_base), "--gpu", "cpu", *wrong)
    assert words in sentence
    assert sorted(folder.rglob("*")) == before, "a refused request left something behind"


def test_a_base_without_vae_is_refused(folder, tiny_base, photographs, capsys):
    whole = tiny_base.read_bytes()
    (folder / "no-vae.safetensors").write_bytes(whole.replace(b'"first_stage_model.', b'"other_stage_model.'))
    sentence = refused(capsys, "plan", "--images", str(photographs), "--base", "no-vae.safetensors")
    assert "--vae FILE" in sentence


def test_an_existing_plan_is_not_written_over(folder, tiny_base, photographs, capsys):
    request = ["plan", "--images", str(photographs), "--base", str(tiny_base), "--gpu", "cpu"]
    assert main(request) == 0
    first = Path("plan.toml").read_text()
    assert "--force" in refused(capsys, *request, "--trigger", "other")
    assert Path("plan.toml").read_text() == first
    assert main([*request, "--trigger", "other", "--force"]) == 0
    assert 'trigger = "other"' in Path("plan.toml").read_text()


@pytest.fixture
def plan_file(folder, tiny_base, photographs, capsys):
    assert main(["plan", "--images", str(photographs), "--base", str(tiny_base), "--gpu", "cpu", "--trigger", "ohwx"]) == 0
    capsys.readouterr()
    return Path("plan.toml")


@pytest.mark.parametrize("old, new, words", [
    ("\nrank = ", "\nrnak = ", "'rank'"),
    ("\nrank = 32", '\nrank = "32"', "whole number"),
    ("\nplan_version = 1", "\nplan_version = 9", "plan_version"),
    ("\n[network]", "\n[network", "TOML"),
    ("\nimages = ", '\nimages = "/no/such/folder" # ', "no folder"),
    ("\nbase_model = ", '\nbase_model = "/no/such/base" # ', "check the path"),
])
def test_a_wrong_plan_starts_nothing(old, new, words, plan_file, capsys):
    text = plan_file.read_text()
    assert old in text
    plan_file.write_text(text.replace(old, new))
    assert words in refused(capsys, "train", str(plan_file))
    assert not Path("runs").exists()


def test_a_taken_run_name_is_refused_and_the_run_left_alone(plan_file, folder, capsys):
    (folder / "runs/ohwx").mkdir(parents=True)
    (folder / "runs/ohwx/plan.toml").write_text("mine")
    sentence = refused(capsys, "train", str(plan_file))
    assert "another name" in sentence and "crumb resume ohwx" in sentence
    assert [path.name for path in (folder / "runs/ohwx").iterdir()] == ["plan.toml"]


@pytest.mark.parametrize("command", ["stop", "sample", "resume", "watch"])
def test_commands_on_a_run_that_is_not_there(command, folder, capsys):
    assert "There is no run called 'nobody'" in refused(capsys, command, "nobody")


def test_stop_on_a_run_without_an_engine(folder, capsys):
    (folder / "runs/idle").mkdir(parents=True)
    (folder / "runs/idle/plan.toml").write_text("")
    assert "crumb resume idle" in refused(capsys, "stop", "idle")
    assert not (folder / "runs/idle/control").exists()


def test_a_finished_run_is_not_resumed(folder, capsys):
    (folder / "runs/done").mkdir(parents=True)
    (folder / "runs/done/plan.toml").write_text("")
    (folder / "runs/done/state.json").write_text('{"state": "done", "step": 4, "steps": 4}')
    assert "is finished" in refused(capsys, "resume", "done")


def test_the_wizard_without_a_terminal_prints_help(folder, capsys):
    assert main([]) == 2
    assert "crumb demo" in capsys.readouterr().err
