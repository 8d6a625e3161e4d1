"""Imports go one way: wizard -> engine.run and profiles; engine -> kernels and profiles; kernels -> torch alone."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "diffusers", "transformers", "accelerate", "bitsandbytes", "triton")

FORBIDDEN = {
    "wizard": (*HEAVY, "crumb.kernels"),
    "profiles": (*HEAVY, "textual", "rich", "crumb.wizard", "crumb.engine", "crumb.kernels"),
    "engine": ("textual", "rich", "crumb.wizard"),
    "engine/run": (*HEAVY, "textual", "rich", "crumb.wizard", "crumb.kernels"),
    "kernels": ("crumb.engine", "crumb.profiles", "crumb.wizard", "diffusers", "transformers", "textual", "rich"),
}


def imported_names(path: Path) -> set[str]:
    """Every module a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


@pytest.mark.parametrize("room", FORBIDDEN)
def test_no_file_imports_what_its_room_must_not_know(room):
    for path in (ROOT / room).rglob("*.py"):
        for name in imported_names(path):
            for forbidden in FORBIDDEN[room]:
                assert name != forbidden and not name.startswith(f"{forbidden}."), f"{path} imports {name}"
            if room == "wizard" and name.startswith("crumb.engine"):
                assert name == "crumb.engine" or name.startswith("crumb.engine.run"), f"{path} imports {name}"


@pytest.mark.parametrize("room", ["wizard", "profiles", "engine/run"])
def test_importing_a_room_loads_no_torch(room):
    """Deferred and indirect imports too: all modules of the room, in one fresh interpreter."""
    modules = [
        "crumb." + ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted((ROOT / room).rglob("*.py")) if path.name != "__main__.py"
    ]
    code = f"import importlib, sys\nfor m in {modules}: importlib.import_module(m)\n" \
           f"print([m for m in {list(HEAVY)} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_profiles_import_in_a_blink():
    """The wizard's first screen waits for this: below 150 ms, the interpreter's own start not counted."""
    code = ("import time; t = time.process_time()\n"
            "import crumb.profiles.interview, crumb.profiles.hardware, crumb.profiles.plan\n"
            "print(time.process_time() - t)")
    best_s = min(float(subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True,
                                      check=True).stdout) for _ in range(5))
    assert best_s < 0.15, f"{best_s * 1000:.0f} ms"
