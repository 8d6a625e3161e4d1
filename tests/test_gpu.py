"""What only a CUDA device can show: the job in every number format, with the optimizers people use. `make gpu`."""

import os
import subprocess
import sys

import pytest
import torch

from crumb.engine.network.verify import verify_lora
from crumb.engine.run.directory import RunDirectory
from crumb.engine.run.events import read_events
from crumb.profiles.optimizers import ADAPTIVE_OPTIMIZERS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize(("precision", "optimizer", "others"), [
    ("bf16", "AdamW8bit", {}), ("fp16", "AdamW", {}), ("fp16", "AdamW8bit", {}), ("bf16", "Prodigy", {}), ("no", "AdamW", {}),
    ("bf16", "DAdaptAdam", {}), ("bf16", "Adafactor", {}),
    ("bf16", "Prodigy8bit", {"quantize_base": "int8"}), ("fp16", "AdamW8bit", {"quantize_base": "int8"}),
    ("bf16", "AdamW8bit", {"quantize_base": "nf4", "gradient_checkpointing": "false", "int8_activations": "true"}),
    ("bf16", "AdamW8bit", {"targets": "attention+ff+conv", "gradient_checkpointing": "false"})], ids=str)
def test_the_job_on_a_gpu(tiny_base, photographs, tmp_path, precision, optimizer, others):
    plan = tmp_path / "plan.toml"
    rate = "1.0" if optimizer in ADAPTIVE_OPTIMIZERS else "1e-3"
    settings = {"mixed_precision": precision, "optimizer": optimizer, "learning_rate": rate, "steps": 60, "rank": 8,
                "gradient_checkpointing": "true", "sample_every": 30, "save_every": 20, **others}
    options = [part for item in settings.items() for part in ("--set", "=".join(map(str, item)))]
    subprocess.run([sys.executable, "-P", "-m", "crumb.wizard", "plan", "--images", photographs, "--base", tiny_base,
                    "--trigger", "ohwx", "--out", plan, *options], check=True, stdout=subprocess.DEVNULL)
    results = []
    for name in ("first", "again"):
        done = subprocess.run([sys.executable, "-P", "-m", "crumb.wizard", "train", plan, "--plain"], capture_output=True,
                              text=True, env=os.environ | {"CRUMB_RUNS": str(tmp_path / name)}, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        run = RunDirectory(tmp_path / name / "ohwx")
        results.append(run.result.read_bytes())
        losses = [event["loss"] for event in read_events(run.events)[0] if event["type"] == "step" and event["loss"]]
        assert verify_lora(run.result).ok and sum(losses[-15:]) < sum(losses[:15])
    assert results[0] == results[1], "the same plan gave another file on this GPU"
