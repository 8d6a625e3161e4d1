"""What the commands print: the names other programs rely on, help with examples, exactly one JSON object."""

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

from crumb.profiles.hardware import Gpu, resolve_gpu
from crumb.profiles.plan import load_plan
from crumb.wizard import doctor
from crumb.wizard.cli import build_parser, main

PROMISED = {
    "method", "rank", "alpha", "conv_rank", "mixed_precision", "save_precision", "optimizer", "optimizer_args",
    "learning_rate", "text_encoder_learning_rate", "scheduler", "warmup_ratio", "resolution", "buckets", "repeats", "epochs",
    "steps", "batch_size", "clip_skip", "noise_offset", "regularization", "tag_threshold", "gradient_checkpointing",
    "cache_latents", "vram_gib",
}
COMMANDS = ("plan", "demo", "train", "resume", "watch", "runs", "stop", "sample", "sheet", "verify", "doctor", "import",
            "export")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def request(base, photographs, *more):
    return ["plan", "--images", str(photographs), "--base", str(base), "--gpu", "RTX 3060 12GB", "--trigger", "ohwx", *more]


def test_plan_json_holds_every_promised_name(tiny_base, photographs, folder, capsys):
    assert main(request(tiny_base, photographs, "--json", "--set", "rank=8")) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed.keys() >= PROMISED, PROMISED - printed.keys()
    assert printed["rank"] == {"value": 8, "rule": "", "reason": "set by you"}
    assert printed["alpha"]["value"] == 4.0 and printed["alpha"]["rule"] == "ALPHA-HALF"
    assert all(value.keys() == {"value", "rule", "reason"} for name, value in printed.items() if name != "warnings")
    assert {"rule", "text"} == set(printed["warnings"][0])
    assert list(folder.glob("*.toml")) == [], "--json writes a file only when --out names one"


def test_flips_subsets_and_regularization_reach_the_plan(tiny_base, photographs, folder, capsys):
    for name in ("more", "reg"):
        (folder / name).mkdir()
        shutil.copy(photographs / "coffee.jpg", folder / name / f"{name}.jpg")
    command = request(tiny_base, photographs, "--flip", "--subset", "images=more,repeats=3,flip=false", "--set",
                      "regularization=reg", "--set", "prior_loss_weight=0.5", "--set", "masked_loss=alpha")
    assert main([*command, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["flip"]["value"] is True and printed["subsets"]["value"] == [{"images": "more", "repeats": 3, "flip": False}]
    assert (printed["regularization"]["value"], printed["regularization"]["rule"]) == ("reg", "REG")
    assert any(warning["rule"] == "BUCKET" and "2 of 4" in warning["text"] for warning in printed["warnings"])
    assert any("should have a mask" in warning["text"] for warning in printed["warnings"])

    assert main([*command, "--out", "plan.toml"]) == 0
    output = capsys.readouterr().out
    assert "views of regularization pictures)" in " ".join(output.split())
    plan = load_plan(folder / "plan.toml")
    assert (plan.flip, plan.masked_loss, plan.prior_loss_weight) == (True, "alpha", 0.5)
    assert plan.subsets == [{"images": str(folder / "more"), "repeats": 3, "flip": False}]
    assert plan.regularization == str(folder / "reg")


def test_plan_table_fits_80_columns_and_the_file_holds_the_same(tiny_base, photographs, folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(request(tiny_base, photographs, "--out", "my plan.toml")) == 0
    output = capsys.readouterr().out
    assert max(map(len, output.splitlines())) <= 80, output
    assert "\x1b" not in output
    assert "Next:  crumb train 'my plan.toml'" in output
    plan = load_plan(folder / "my plan.toml")
    assert plan.name == "ohwx" and plan.optimizer == "Prodigy" and plan.vram_gib == 12


def test_every_command_has_help_with_an_example(capsys):
    for command in COMMANDS:
        with pytest.raises(SystemExit) as left:
            build_parser().parse_args([command, "--help"])
        assert left.value.code == 0
        assert f"example: crumb {command}" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        build_parser().parse_args(["--help"])
    listed = set(re.findall(r"^    (\w+) ", capsys.readouterr().out, re.MULTILINE))
    assert listed == set(COMMANDS), "a command of later work must not be listed before it is there"


def test_runs_as_json(folder, capsys):
    assert main(["runs", "--json"]) == 0
    earlier = json.loads(capsys.readouterr().out)
    run = folder / "runs/one"
    run.mkdir(parents=True)
    (run / "plan.toml").write_text("")
    (run / "state.json").write_text('{"state": "stopped", "step": 3, "steps": 9, "heartbeat": 1}')
    (run / "events.jsonl").write_text('{"time": 1, "type": "step", "step": 3, "loss": 0.2, "loss_smoothed": 0.25}\n')
    assert main(["runs", "--json"]) == 0
    (found,) = [run for run in json.loads(capsys.readouterr().out) if run not in earlier]
    assert {key: found[key] for key in ("name", "state", "step", "steps", "loss")} == {
        "name": "one", "state": "stopped", "step": 3, "steps": 9, "loss": 0.25}


def test_doctor_tells_what_follows_from_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "PACKAGES", {"no-such-package": "AdamW8bit falls back", "rich": "no colours"})
    monkeypatch.setattr(doctor, "detect_gpu", lambda: None)
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["no-such-package"]["status"] == "missing"
    assert found["no-such-package"]["consequence"] == "AdamW8bit falls back"
    assert found["rich"]["status"] == "ok"
    assert found["gpu"]["status"] == "missing" and "processor" in found["gpu"]["consequence"]
    assert {finding["status"] for finding in found.values()} <= {"ok", "missing", "broken"}


@pytest.mark.parametrize(("gpu", "speed", "consequence", "speed_consequence"), [
    (resolve_gpu("RTX 3060 12GB"), "25.5 TFLOP/s in bf16 and fp16, 101.9 TOPS in int8 (28 SMs x 1777 MHz); its memory "
     "360 GB/s; PCIe 4.0 x16, about 24 GB/s", "", ""),
    (replace(resolve_gpu("GTX 1650"), pcie_lanes=1), "2.8 TFLOP/s in fp16", "are tried before a run", "streamed slowly"),
    (resolve_gpu("V100"), "113.0 TFLOP/s", "CUDA 12.6", ""), (Gpu("GTX 1080", 8, 6.1), "not known", "CUDA 12.6", "")])
def test_doctor_tells_what_a_card_can_do(gpu, speed, consequence, speed_consequence):
    card, rates = doctor._gpu(gpu), doctor._gpu_speed(gpu)
    assert speed in rates.detail and consequence in card.consequence and speed_consequence in rates.consequence
    assert bool(consequence) == bool(card.consequence) and bool(speed_consequence) == bool(rates.consequence)


def test_a_package_that_kills_its_process_is_a_finding(tmp_path, monkeypatch):
    (tmp_path / "deadly.py").write_text("import os; os._exit(9)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert doctor.probe_packages(["rich", "deadly", "json"]) == {"rich": {"name": "rich", "ok": True, "why": ""}}


@pytest.mark.parametrize("term, words", [("dumb", "crumb --plain"), ("xterm", "New LoRA")])
def test_the_wizard_in_a_real_terminal(term, words):
    """On a pty: the first screen comes and no heavy package is imported for it; a dumb terminal is refused in words."""
    master, slave = pty.openpty()
    code = ("import sys; from crumb.wizard import app, cli\n"
            "app.Wizard.on_ready = lambda self: self.set_timer(0.3, lambda: self.exit(0))\n"
            "code = cli.main([])\n"
            "heavy = {'torch', 'diffusers', 'transformers', 'PIL'} & sys.modules.keys()\n"
            "print('heavy:', heavy or 'none'); sys.exit(code)")
    process = subprocess.Popen([sys.executable, "-P", "-c", code], stdin=slave, stdout=slave, stderr=slave,
                               env={**os.environ, "TERM": term, "COLUMNS": "80", "LINES": "24"}, start_new_session=True)
    os.close(slave)
    output = b""
    while True:
        try:
            chunk = os.read(master, 65536)
        except OSError:
            break
        if not chunk:
            break
        output += chunk
    os.close(master)
    text = output.decode(errors="replace")
    assert process.wait(timeout=20) == (2 if term == "dumb" else 0), text
    assert words in text
    assert "heavy: none" in text


@pytest.mark.parametrize("number", ["0", "two", "-1"])
def test_a_number_of_gpus_that_is_none_is_said(number, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train", "plan.toml", f"--gpus={number}"])
    assert ended.value.code == 2 and "whole number from 1" in capsys.readouterr().err
