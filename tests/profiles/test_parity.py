"""docs/parity.md is what its script writes, leaves no setting out, and names only tests that exist."""

import re
from pathlib import Path

import pytest

from crumb.profiles.kohya.parity import DATA, DOCUMENT, checks, document, shown_settings
from crumb.profiles.kohya.table import KNOWN_KEYS, TABLE
from crumb.profiles.plan import plan_fields

ROOT = Path(__file__).parents[2]


def test_the_document_is_what_the_script_writes():
    assert DOCUMENT.read_text(encoding="utf-8") == document(), "run python -P -m crumb.profiles.kohya.parity"


def test_every_setting_is_in_the_document_or_named_as_without_counterpart():
    rows = re.findall(r"^\| `(\w+)` \|", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) == len(set(rows)) and not set(rows) & set(DATA["without_counterpart"])
    assert set(rows) | set(DATA["without_counterpart"]) == set(plan_fields())


def test_no_entry_is_about_a_setting_that_nobody_knows():
    """Settings that the table names may come; all others must be the plan's."""
    known = set(plan_fields()) | {name for row in TABLE for name in row.crumb} | {"caption_variants"}
    assert set(DATA["settings"]) <= known and set(DATA["values"]) <= set(plan_fields())
    assert set(DATA["as_long_as"]) <= set(DATA["one_trainer_more"])
    assert set(DATA["as_long_as"].values()) <= KNOWN_KEYS
    for entry in DATA["settings"].values():
        assert set(entry) <= {"one_trainer", "checked", "gap"} and "one_trainer" in entry


@pytest.mark.parametrize("name", DATA["settings"])
def test_named_tests_exist(name):
    for test, reference in checks(name):
        path, _, function = test.partition("::")
        assert re.search(rf"^(async )?def {function}\(", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE), test
        assert reference


def test_named_files_exist():
    for where in DATA["crumb_alone"].values():
        assert (ROOT / where).exists(), where


def test_what_has_no_test_is_said():
    text = document()
    for name in shown_settings():
        row = next(line for line in text.splitlines() if line.startswith(f"| `{name}` |"))
        assert row.endswith("| no test |") == (not checks(name)), row
