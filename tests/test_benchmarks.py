"""benchmarks/kernels.py on tiny sizes: every arm computes what it should, and the results are written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "kernels.py"
LIMIT_16_BIT = 1e-2
"""bfloat16: a few roundings of 2⁻⁸ each."""
LIMITS = {("linear", "crumb int8"): 0.04, ("block", "crumb int8"): 0.02, ("block", "crumb NF4"): 0.06}
"""int8 linears round x as well. A block's reference has the weights as they were before quantising, a linear's after."""


def run(*options):
    return subprocess.run([sys.executable, "-P", SCRIPT, *options], capture_output=True, text=True, check=False,
                          env=os.environ | {"CRUMB_KERNELS": "plain", "OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("results")
    done = run("--cpu", "--quick", "--out", out)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    folder, = out.iterdir()
    return json.loads((folder / "kernels.json").read_text()), (folder / "kernels.md").read_text(), done.stdout


def test_every_arm_of_every_group_gave_a_row(results):
    rows = results[0]["rows"]
    assert {row["group"] for row in rows} == {"linear", "norm", "block", "optimizer"}
    failed = [(row["case"], row["arm"], row["error"]) for row in rows
              if "error" in row and not row["error"].startswith("not installed")]
    assert not failed
    assert all(row["passes"] for row in rows if "error" not in row)


def test_crumb_is_right_in_every_case(results):
    rows = [row for row in results[0]["rows"] if row["arm"].startswith("crumb") and row["group"] != "optimizer"]
    assert {name for row in rows for name in row["errors"]} == {"y", "dX", "dA", "dB"}
    for row in rows:
        limit = LIMITS.get((row["group"], row["arm"].split(",")[0]), LIMIT_16_BIT)
        for name, error in row["errors"].items():
            assert error < limit, (row["case"], row["arm"], name, error)


def test_the_tables_name_every_arm_and_who_lost(results):
    _, markdown, log = results
    assert "bitsandbytes NF4, PEFT" in markdown and "All 722 linears of a step, rank 16" in markdown
    assert "crumb int8 linear:" in markdown and "crumb int8 linear:" in log
    summary = log[log.index("== processor"):].splitlines()
    assert len(summary) <= 41


def test_without_a_gpu_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run("--quick")
    assert done.returncode == 2 and "needs a CUDA GPU" in done.stderr


def test_the_layers_counted_are_those_of_sdxl(monkeypatch):
    """Against diffusers' U-Net of SDXL's config, made without storage."""
    from diffusers import UNet2DConditionModel

    from crumb.engine.model.config import make_unet_config
    from crumb.engine.network.lora import TARGETS

    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "kernel_arms"))
    from linears import layer_counts
    from optimizers import lora_shapes

    with torch.device("meta"):
        unet = UNet2DConditionModel(**make_unet_config([320, 640, 1280], [0, 2, 10], 2048, 1280, 2816, 128))
    found: dict[tuple[int, int], int] = {}
    for name, module in unet.named_modules():
        if isinstance(module, torch.nn.Linear) and any(pattern.fullmatch(name) for pattern in TARGETS["attention+ff"]):
            size = module.in_features, module.out_features
            found[size] = found.get(size, 0) + 1
    assert {shape[1:]: number for shape, number in layer_counts().items()} == found
    assert len(lora_shapes()) == 1444
