"""`crumb import` and `crumb export`: settings of sd-scripts and kohya_ss in and out, with a list of what was done to each."""

import json
import shlex
from pathlib import Path
from typing import Any

from crumb.engine.run.directory import check_run_name, write_atomic
from crumb.profiles.errors import RequestError
from crumb.profiles.kohya.exporting import Export, export_plan
from crumb.profiles.kohya.importing import Taken, Translation, answers_of, conclude_import, translate
from crumb.profiles.kohya.reading import read_settings
from crumb.profiles.kohya.table import Left
from crumb.profiles.kohya.values import Later
from crumb.profiles.plan import load_plan_to_move
from crumb.wizard.planning import (
    answers_from,
    as_json,
    as_text,
    hand_over,
    look_at_pictures,
    plan_file,
    print_plan,
    refuse_existing,
)

MAX_VALUE = 40
"""Letters of a value that are shown in a list."""


def import_settings(options) -> int:
    """`crumb import FILE`."""
    out = plan_file(options)
    given = answers_from(options)
    file = read_settings(Path(options.file), Path(options.dataset_config) if options.dataset_config else None)
    translation = translate(file, given.overrides)
    answers = answers_of(translation, given)
    scan = look_at_pictures(answers)
    interview = conclude_import(translation, answers, scan)
    check_run_name(interview.plan.name)
    if options.json:
        _print_json({**_import_as_json(translation), "plan": as_json(interview)})
    else:
        _print_import(translation)
        left_open = [name for name in interview.derivation.values if not translation.origin(name)]
        _say("\nLeft open there, so derived by the guide's rules (* set by you):")
        print_plan(interview, left_open)
    hand_over(interview, out, options)
    return 0


def export_settings(options) -> int:
    """`crumb export PLAN.toml --to kohya`."""
    path = Path(options.plan)
    export = export_plan(load_plan_to_move(path)[0])
    out = Path(options.out or f"{path.stem}-{options.to}.toml")
    files = export.files(out)
    for file in files:
        refuse_existing(file, options)
    for file, content in files.items():
        try:
            write_atomic(file, content.encode())
        except OSError as error:
            raise RequestError(f"{file} can't be written ({error.strerror}). Name another file with --out.") from None
    if options.json:
        _print_json({"files": list(map(str, files)), "missing": _entries(export.missing), "ignored": _entries(export.ignored)})
    else:
        _print_export(export, list(files))
    return 0


def _print_json(content: dict[str, Any]) -> None:
    print(json.dumps(content, indent=1, ensure_ascii=False, default=str))


def _import_as_json(translation: Translation) -> dict[str, Any]:
    taken = [{"kohya": taken.kohya, "crumb": _final(translation, taken), "note": taken.note, "off": taken.off}
             for taken in translation.taken]
    return {"taken": taken, "missing": _entries(translation.missing), "ignored": _entries(translation.ignored)}


def _entries(left: list[Left]) -> list[dict[str, Any]]:
    return [{"key": one.key, "value": one.value, "reason": one.reason} for one in left]


def _final(translation: Translation, taken: Taken) -> dict[str, Any]:
    """The settings; values that had to wait for the run's length as they came out."""
    return {name: translation.overrides[name] if isinstance(value, Later) else value for name, value in taken.crumb.items()}


def _print_import(translation: Translation) -> None:
    shown = [taken for taken in translation.taken if not taken.off]
    _say(f"Taken over from {translation.file.path} ({len(shown)}):")
    _print_table([(_equals(taken.kohya), _equals(_final(translation, taken)), taken.note) for taken in shown],
                 ("There", "Here", ""))
    off = [name for taken in translation.taken if taken.off for name in taken.crumb]
    if off:
        _say(f"\nSwitched off or neutral, as it is there: {', '.join(off)}.")
    _print_missing(translation.missing, len(translation.ignored), "keys that are neutral, or about the GUI, paths and logging")


def _print_export(export: Export, files: list[Path]) -> None:
    _print_missing(export.missing, len(export.ignored), "settings that are neutral, or about this machine")
    print("\nWrote " + ", ".join(map(str, files)))
    print(f"Next, in sd-scripts:  accelerate launch sdxl_train_network.py --config_file {shlex.quote(str(files[0]))}")


def _print_missing(missing: list[Left], num_ignored: int, what: str) -> None:
    _say(f"\nHas no counterpart ({len(missing)}):" if missing else "\nEverything has a counterpart.")
    _print_table([(_equals({one.key: one.value}), one.reason) for one in missing], ("Setting", "Why, or what happens instead"))
    _say(f"\nLeft out without loss: {num_ignored} {what} (--json lists them).")


def _equals(values: dict[str, Any]) -> str:
    return "\n".join(f"{key} (not set)" if value is None else f"{key} = {_short(value)}" for key, value in values.items())


def _short(value: Any) -> str:
    text = as_text(value)
    return text if len(text) <= MAX_VALUE else f"{text[:MAX_VALUE - 1]}…"


def _say(text: str) -> None:
    """A sentence, broken at words where the terminal ends."""
    from rich.console import Console

    Console(highlight=False, markup=False).print(text)


def _print_table(rows: list[tuple[str, ...]], titles: tuple[str, ...]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not rows:
        return
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for title in titles:
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    Console(highlight=False, markup=False).print(table)
