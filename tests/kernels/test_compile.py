"""Every kernel compiles for every architecture within its limits, with tensor cores where they are meant to be used."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SHARED_BYTES = {75: 65536, 80: 166912, 86: 101376, 89: 101376, 90: 232448, 120: 101376}
"""What one block may take (CUDA C++ Programming Guide, table of technical specifications)."""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    script = Path(__file__).with_name("compiling.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-P", script], capture_output=True, text=True, check=False,
                          env=environment | {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))})
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_within_the_limits_of_every_architecture(compiled):
    assert compiled
    wrong = [f"sm_{one['architecture']} {one['name']}: {one}" for one in compiled
             if one["spill_bytes"] or one["shared_bytes"] > SHARED_BYTES[one["architecture"]]]
    assert not wrong, "\n".join(wrong)


def test_tensor_cores_are_used_where_they_are_meant_to_be(compiled):
    meant = [one for one in compiled if one["wants_mma"]]
    wrong = [f"sm_{one['architecture']} {one['name']}" for one in meant if not one["num_mma"]]
    assert not wrong, "\n".join(wrong)
