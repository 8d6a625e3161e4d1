"""docs/parity.md: every setting beside sd-scripts' and OneTrainer's names, and the test that checked it.

Written from the table of correspondences and parity.toml by `python -P -m crumb.profiles.kohya.parity`.
"""

import tomllib
from collections.abc import Iterator
from pathlib import Path

from crumb.profiles.kohya.table import TABLE, Row
from crumb.profiles.plan import plan_fields

DATA = tomllib.loads(Path(__file__).with_name("parity.toml").read_text(encoding="utf-8"))
DOCUMENT = Path(__file__).parents[2] / "docs" / "parity.md"

HEAD = """\
# Every setting beside sd-scripts' and OneTrainer's

Written by `python -P -m crumb.profiles.kohya.parity` from [profiles/kohya/table.py](../profiles/kohya/table.py), which
`crumb import` and `crumb export` follow too, and [profiles/kohya/parity.toml](../profiles/kohya/parity.toml). OneTrainer's
names are those of its `TrainConfig`; `concept.` and `sample.` stand for a concept's and a sample's own configuration. A name
beside another says where to look, not that both programs do the same to the last digit: neither was run beside crumb.

The last column names a test and what it compares with that is not crumb's own: another program, a formula by hand, a
count; "no test" means that there is none.
"""


def document() -> str:
    """The whole file."""
    return "\n".join([HEAD, *_table(), "", *_unchecked(), *_without_counterpart(), *_sd_scripts_more(), *_one_trainer_more(),
                      *_crumb_alone()])


def shown_settings() -> list[str]:
    """The plan's settings that have a line in the table."""
    return [name for name in plan_fields() if name not in DATA["without_counterpart"]]


def checks(name: str) -> list[tuple[str, str]]:
    """The tests that checked a setting, each with its reference."""
    return [tuple(text.split(", ", 1)) for text in DATA["settings"].get(name, {}).get("checked", [])]


def _table() -> Iterator[str]:
    yield "| crumb setting | sd-scripts flag | OneTrainer name | how crumb's was checked |"
    yield "|---|---|---|---|"
    for name in shown_settings():
        yield f"| `{name}` | {_sd_scripts(name)} | {_one_trainer(name)} | {_checked(name)} |"


def _sd_scripts(name: str) -> str:
    rows = [row for row in TABLE if name in row.crumb]
    flags = [f"`{key}`" for row in rows for key in row.kohya]
    in_network_args = " (network_args)" if flags and all(row.place == "network_args" for row in rows if row.kohya) else ""
    return ", ".join(flags) + in_network_args if flags else f"none: {rows[0].reason}" if rows else "none"


def _one_trainer(name: str) -> str:
    names, _, remark = DATA["settings"].get(name, {}).get("one_trainer", "").partition(" (")
    if not names:
        return "none"
    shown = names if " " in names and "," not in names else ", ".join(f"`{one}`" for one in names.split(", "))
    return f"{shown} ({remark}" if remark else shown


def _checked(name: str) -> str:
    found = checks(name)
    gap = DATA["settings"].get(name, {}).get("gap")
    shown = "; ".join(f"`{test}`, {reference}" for test, reference in found) if found else "no test"
    return f"{shown}. Not covered: {gap}" if gap else shown


def _unchecked() -> Iterator[str]:
    settings = DATA["settings"]
    none = [f"`{name}`" for name in shown_settings() if not checks(name)]
    partly = [f"`{name}`" for name in shown_settings() if checks(name) and "gap" in settings.get(name, {})]
    yield f"Without such a test: {', '.join(none) or 'none'}. Checked in part: {', '.join(partly) or 'none'}.\n"


def _without_counterpart() -> Iterator[str]:
    names = "; ".join(f"`{name}` ({why})" for name, why in DATA["without_counterpart"].items())
    yield f"Not in the table, because they are names, dates or about the machine: {names}.\n"


def _sd_scripts_more() -> Iterator[str]:
    """Keys of sd-scripts' that the table gives no setting, with what crumb does instead."""
    yield "## What sd-scripts has for SDXL LoRA and crumb has not\n"
    for row in TABLE:
        if _lacks(row) and row.kohya != ("v2",):
            yield f"- {', '.join(f'`{key}`' for key in row.kohya)}: {row.reason}"
    yield from _values("sd_scripts")


def _lacks(row: Row) -> bool:
    is_held = row.to_crumb and any(name in plan_fields() for name in row.crumb)
    return bool(row.kohya) and not is_held and not row.ignored


def _one_trainer_more() -> Iterator[str]:
    yield "## What OneTrainer has for SDXL LoRA and crumb has not\n"
    lacking = {key for row in TABLE if _lacks(row) for key in row.kohya}
    for what, where in DATA["one_trainer_more"].items():
        if DATA["as_long_as"].get(what) in {None, *lacking}:
            yield f"- {what} ({', '.join(f'`{name}`' for name in where.split(', '))})"
    yield from _values("one_trainer")


def _values(program: str) -> Iterator[str]:
    """Values of settings that take one of a list, as far as the plan does not take them."""
    for setting, known in DATA["values"].items():
        ours = {choice.lower() for choice in plan_fields()[setting].metadata["choices"]}
        more = [value for value in known[program] if value.lower() not in ours]
        if more:
            yield f"- of `{setting}`: {', '.join(more)}"
    yield ""


def _crumb_alone() -> Iterator[str]:
    yield "## What crumb has and neither of them has, as far as their settings tell\n"
    for what, where in DATA["crumb_alone"].items():
        yield f"- {what} ([{where}](../{where}))"
    yield ""


if __name__ == "__main__":
    DOCUMENT.write_text(document(), encoding="utf-8")
