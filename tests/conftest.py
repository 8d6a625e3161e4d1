"""What every test shares: private folders, a tiny SDXL file, a folder of real photographs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from crumb.profiles.plan import Plan


def pytest_configure(config):
    """Without a GPU Triton's kernels run in its interpreter, which must be known before any of them is imported."""
    if config.getoption("markexpr") != "gpu":
        os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session", autouse=True)
def private_folders(tmp_path_factory):
    """No test touches this person's caches, state or runs; the cache is shared by the session, as in life."""
    home = tmp_path_factory.mktemp("home")
    patch = pytest.MonkeyPatch()
    for name, folder in (("CRUMB_CACHE", "cache"), ("XDG_STATE_HOME", "state"), ("XDG_CONFIG_HOME", "config"),
                         ("XDG_CACHE_HOME", "xdg-cache")):
        patch.setenv(name, str(home / folder))
    patch.setenv("HF_HUB_OFFLINE", "1")
    patch.delenv("TERM", raising=False)
    yield
    patch.undo()


@pytest.fixture(autouse=True)
def private_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("CRUMB_RUNS", str(tmp_path / "runs"))


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Path:
    """A single-file SDXL checkpoint in the real key layout with small widths and random weights."""
    path = tmp_path_factory.mktemp("base") / "tiny-sdxl.safetensors"
    subprocess.run([sys.executable, "-P", "-m", "crumb.engine.model.tiny", str(path)], check=True, env=os.environ)
    return path


@pytest.fixture(scope="session")
def photographs(tmp_path_factory) -> Path:
    """Six photographs with captions, as a folder of their own (tests/photographs/SOURCES.md: whose they are)."""
    folder = tmp_path_factory.mktemp("photographs")
    for file in (Path(__file__).parent / "photographs").iterdir():
        if file.suffix in (".jpg", ".txt"):
            shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="session")
def make_plan():
    """A small plan with the settings that a test is about."""
    required = {"name": "t", "created": "2026-01-01T00:00:00+00:00", "base_model": "base.safetensors", "images": "pictures",
                "resolution": 128, "mixed_precision": "no", "optimizer": "AdamW", "device": "cpu"}
    return lambda **settings: Plan(**required | settings)
