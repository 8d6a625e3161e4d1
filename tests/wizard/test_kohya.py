"""`crumb import` and `crumb export` as a person meets them: lists, files, refusals and one JSON object."""

import json
from pathlib import Path

import pytest

from crumb.profiles.plan import load_plan
from crumb.wizard.cli import main

PRESET = json.loads((Path(__file__).parents[1] / "profiles/kohya_preset.json").read_text())


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


@pytest.fixture
def request_import(folder, photographs, tiny_base):
    """The command on a preset with these changes, and further options."""
    def run(*more, paths=True, **changes) -> int:
        (folder / "preset.json").write_text(json.dumps(PRESET | changes))
        named = ["--images", str(photographs), "--base", str(tiny_base)] if paths else []
        return main(["import", "preset.json", *named, "--gpu", "RTX 3060 12GB", *more])
    return run


def test_import_prints_what_became_of_each_key(request_import, folder, capsys):
    assert request_import("--trigger", "ohwx", LoRA_type="LyCORIS/LoHa", optimizer="PagedAdamW8bit", color_aug=True,
                          wandb_api_key="a-secret") == 0
    output = capsys.readouterr().out
    assert max(map(len, output.splitlines())) <= 80, output
    head, missing, left_open = output.partition("Has no counterpart")[0], *output.partition("Has no counterpart")[2].split(
        "Left open there", 1)
    assert "network_dim = 24" in head and "rank = 24" in head and "no PagedAdamW8bit" in " ".join(head.split())
    assert "Switched off or neutral, as it is there: prediction_type," in head
    assert "LyCORIS/LoHa" in missing and "a LoRA of the same rank" in " ".join(missing.split())
    assert "color_aug = true" in missing and "a-secret" not in output
    assert "save_every" not in left_open and "held_out_pictures" in left_open
    assert "Wrote plan.toml. Next:  crumb train plan.toml" in output
    plan = load_plan(folder / "plan.toml")
    assert (plan.rank, plan.optimizer, plan.trigger, plan.conv_rank) == (24, "AdamW8bit", "ohwx", 32)
    assert "why: from preset.json (optimizer)" in (folder / "plan.toml").read_text()


def test_import_as_json_is_one_object_and_writes_nothing(request_import, folder, capsys):
    assert request_import("--json", "--set", "rank=5", wandb_api_key="a-secret") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed.keys() == {"taken", "missing", "ignored", "plan"}
    same = {"optimizer": "AdamW8bit"}
    assert {"kohya": same, "crumb": same, "note": "", "off": False} in printed["taken"]
    assert {"key": "network_dim", "value": 24, "reason": "--set gives another"} in printed["missing"]
    assert {"key": "xformers", "value": "xformers", "reason": "crumb chooses the fastest attention"} in printed["ignored"]
    assert {"key": "wandb_api_key", "value": "(hidden)", "reason": "about logging"} in printed["ignored"]
    assert printed["plan"]["rank"] == {"value": 5, "rule": "", "reason": "set by you"}
    saved = next(taken["crumb"]["save_every"] for taken in printed["taken"] if "save_every" in taken["crumb"])
    assert saved == printed["plan"]["save_every"]["value"], "a value that waits for the length is shown as it came out"
    assert list(folder.glob("*.toml")) == []


def test_import_refuses_with_a_mend_and_leaves_files_alone(request_import, folder, capsys):
    assert request_import(paths=False) == 2
    assert "--images DIR" in capsys.readouterr().err
    (folder / "plan.toml").write_text("mine")
    assert request_import() == 2
    assert "--out" in capsys.readouterr().err and (folder / "plan.toml").read_text() == "mine"
    assert request_import("--out", "other.toml", optimizer="AdamW", learning_rate=1.0, unet_lr=1.0) == 2
    assert "--set KEY=VALUE" in capsys.readouterr().err and not (folder / "other.toml").exists()
    assert main(["import", "plan.toml", "--out", "other.toml"]) == 2
    assert "no valid TOML" in capsys.readouterr().err
    assert main(["import", "nowhere.json", "--out", "other.toml"]) == 2
    assert "There is no file nowhere.json" in capsys.readouterr().err
    assert request_import("--force") == 0


def test_export_and_import_give_the_same_plan(request_import, folder, capsys):
    assert request_import("--class", "cat", "--set", "held_out_pictures=1", output_name="my cat") == 0
    capsys.readouterr()
    assert main(["export", "plan.toml", "--to", "kohya"]) == 0
    output = capsys.readouterr().out
    assert "held_out_pictures = 1" in output and "validation_split" in output
    assert "Next, in sd-scripts:  accelerate launch sdxl_train_network.py --config_file plan-kohya.toml" in output
    names = ["plan-kohya.toml", "plan-kohya-dataset.toml", "plan-kohya-prompts.toml"]
    assert all((folder / name).is_file() for name in names)
    assert main(["import", "plan-kohya.toml", "--gpu", "RTX 3060 12GB", "--out", "again.toml"]) == 0
    before, after = load_plan(folder / "plan.toml"), load_plan(folder / "again.toml")
    differing = {name for name in vars(before) if getattr(before, name) != getattr(after, name)}
    assert differing <= {"created", "held_out_pictures", "warmup_ratio"}, "the last has no effect with constant"
    assert before.name == after.name == "my cat"


def test_export_writes_over_nothing_and_keeps_to_json(request_import, folder, capsys):
    assert request_import() == 0
    (folder / "out-dataset.toml").write_text("mine")
    capsys.readouterr()
    assert main(["export", "plan.toml", "--to", "kohya", "--out", "out.toml"]) == 2
    assert "out-dataset.toml exists already" in capsys.readouterr().err
    assert not (folder / "out.toml").exists() and (folder / "out-dataset.toml").read_text() == "mine"
    assert main(["export", "plan.toml", "--to", "kohya", "--out", "out.toml", "--force", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [Path(file).name for file in printed["files"]] == ["out.toml", "out-dataset.toml", "out-prompts.toml"]
    assert {"created", "vram_gib"} <= {left["key"] for left in printed["ignored"]}
    assert main(["export", "plan.toml", "--to", "kohya", "--out", "no/such/folder/out.toml"]) == 2
    assert "can't be written" in capsys.readouterr().err
    assert main(["export", "gone.toml", "--to", "kohya"]) == 2


def test_a_plan_with_relative_paths_is_exported_with_absolute_ones(request_import, folder, photographs):
    assert request_import() == 0
    text = (folder / "plan.toml").read_text().replace(str(photographs), "pictures")
    (folder / "pictures").mkdir()
    (folder / "plan.toml").write_text(text)
    assert main(["export", "plan.toml", "--to", "kohya"]) == 0
    assert f'image_dir = "{folder / "pictures"}"' in (folder / "plan-kohya-dataset.toml").read_text()
