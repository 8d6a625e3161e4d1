"""What tests of kohya's settings share: the keys of a preset, files of settings, and the road to a plan."""

import json
from pathlib import Path

import pytest

from crumb.profiles.answers import Answers
from crumb.profiles.dataset import scan_pictures
from crumb.profiles.kohya.importing import answers_of, conclude_import, translate
from crumb.profiles.kohya.reading import read_settings


@pytest.fixture(scope="session")
def scan(photographs):
    return scan_pictures(photographs)


@pytest.fixture
def write(tmp_path):
    """A settings file of the given content, by its ending."""
    def to_file(content, name="settings.toml") -> Path:
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path
    return to_file


@pytest.fixture
def conclude(tiny_base, photographs, scan):
    """From a file to the plan, as the command goes; returns the translation too."""
    def run(path, **given):
        answers = Answers(**{"images": str(photographs), "base": str(tiny_base), "gpu": "RTX 3060 12GB"} | given)
        translation = translate(read_settings(path), answers.overrides)
        return translation, conclude_import(translation, answers_of(translation, answers), scan)
    return run
