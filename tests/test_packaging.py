"""What is installed: every folder, its data files, no bare top-level names, and no clash with Hugging Face's `kernels`."""

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("wizard", "engine", "kernels", "profiles")


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_package_list_names_every_folder_with_code(project):
    folders = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for room in ROOMS
               for path in (ROOT / room).rglob("*.py")}
    assert set(project["tool"]["setuptools"]["packages"]) == {f"crumb.{folder}" for folder in folders}


def test_kernels_is_a_namespace_folder():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_wheel_holds_code_and_data_under_one_namespace(tmp_path):
    # A copy, since setuptools writes build/ beside the sources.
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True,
                           check=True).stdout.splitlines()
    for name in files:
        target = tmp_path / "source" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index",
                    "-w", str(tmp_path), str(tmp_path / "source")], check=True)
    path = next(tmp_path.glob("*.whl"))
    assert path.stat().st_size < 30_000_000, path.stat().st_size
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"crumb"}
    expected = {f"crumb/{name}" for name in files if name.startswith(ROOMS)}
    assert expected - names == set()


@pytest.mark.parametrize("flags", [["-P"], []], ids=["-P", "from the repository root"])
def test_hugging_face_kernels_is_not_shadowed(tmp_path, flags):
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("__version__ = '0.18.2'\nwho = 'hugging face'\n")
    code = ("import kernels, crumb.kernels.lora_linear, importlib.metadata as m; "
            "assert kernels.who == 'hugging face', kernels; "
            "assert not {'kernels', 'engine', 'wizard', 'profiles'} & set(m.packages_distributions())")
    subprocess.run([sys.executable, *flags, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(tmp_path)}, check=True)
