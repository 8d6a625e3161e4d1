"""`crumb plan`: answers from the command line in, plan file and reasons out; and how a plan is shown as text.

The line-by-line interview and the demo show plans with the same functions.
"""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

from crumb.engine.run.directory import check_run_name, write_atomic
from crumb.profiles.answers import Answers
from crumb.profiles.base_model import check_vae, inspect_base_model
from crumb.profiles.data_rules import subsets_for
from crumb.profiles.dataset import Scan, scan_subsets
from crumb.profiles.errors import RequestError
from crumb.profiles.interview import Interview, check_answers, check_override, conclude
from crumb.profiles.plan import plan_fields, toml_value
from crumb.profiles.subsets import subset_as_text, subset_from_text


def plan(options) -> int:
    """`crumb plan`."""
    out = plan_file(options)
    answers = answers_from(options)
    interview = conclude(answers, look_at_pictures(answers))
    check_run_name(interview.plan.name)
    if options.json:
        print(json.dumps(as_json(interview), indent=1, ensure_ascii=False))
    else:
        print_plan(interview)
    hand_over(interview, out, options)
    return 0


def plan_file(options) -> Path | None:
    """Where the plan goes, before any work is done for it; None with --json alone."""
    out = Path(options.out or "plan.toml") if options.out or not options.json else None
    if out:
        refuse_existing(out, options)
    return out


def refuse_existing(out: Path, options) -> None:
    if out.exists() and not options.force:
        raise RequestError(f"{out} exists already. Name another file with --out, or write over it with --force.")


def hand_over(interview: Interview, out: Path | None, options) -> None:
    """Writes the plan, and says what comes next."""
    if out:
        write_plan(interview, out)
    if not options.json:
        print(f"\nWrote {out}. Next:  crumb train {shlex.quote(str(out))}")


def answers_from(options) -> Answers:
    overrides = dict(parse_setting(text) for text in options.settings)
    subsets = [subset_from_text(text, plan_fields()) for text in options.subsets]
    if subsets:
        overrides["subsets"] = [*overrides.get("subsets", []), *subsets]
    return Answers(
        images=options.images, subject=options.subject, base=options.base, vae=options.vae,
        prediction=options.prediction, gpu=options.gpu, vram_gib=options.vram_gib, look=options.look,
        trigger=options.trigger.strip(), class_word=options.class_word.strip(), name=options.name,
        flip=options.flip, skip_broken=options.skip_broken, overrides=overrides,
    )


def parse_setting(text: str) -> tuple[str, Any]:
    """KEY=VALUE as a setting's name and its value in the right type."""
    key, equals, value = text.partition("=")
    if not equals:
        raise RequestError(f"--set {text}: there is no '=' in it. Write it as --set KEY=VALUE, such as --set rank=16.")
    return key.strip(), check_override(key.strip(), value.strip())


def look_at_pictures(answers: Answers) -> Scan:
    """The pictures, after the cheap checks, so that a mistyped base is told before thousands of pictures are read."""
    check_answers(answers)
    inspect_base_model(Path(answers.base).expanduser())
    if answers.vae:
        check_vae(answers.vae)
    return scan_showing_progress(answers)


def scan_showing_progress(answers: Answers) -> Scan:
    """The pictures of all folders that the answers name, with a bar on stderr where that is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("Reading pictures", total=None)
        return scan_subsets(
            subsets_for(answers),
            on_progress=lambda done, total: progress.update(task, completed=done, total=total))


def write_plan(interview: Interview, path: Path) -> None:
    try:
        write_atomic(path, interview.toml().encode())
    except OSError as error:
        raise RequestError(f"The plan can't be written to {path} ({error.strerror}). Name another file with --out.") from None


def as_json(interview: Interview) -> dict:
    values = {
        name: {"value": derived.value, "rule": derived.rule, "reason": derived.reason}
        for name, derived in interview.derivation.values.items()
    }
    return {**values, "warnings": interview.derivation.warnings}


def as_text(value: Any) -> str:
    """A setting's value as a person reads and types it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, dict):
        return " ".join(f"{key}={as_text(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(as_text(item) for item in value)
    return str(value)


def print_plan(interview: Interview, names: list[str] | None = None) -> None:
    """The plan as a table that fits 80 columns, and the warnings under it."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, markup=False)
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=True, header_style="bold", expand=False)
    table.add_column("Setting", no_wrap=True)
    table.add_column("Value", max_width=20, overflow="fold")
    table.add_column("Reason [rule]", overflow="fold")
    for name, derived in interview.derivation.values.items():
        if names is not None and name not in names:
            continue
        mark = "*" if name in interview.answers.overrides else ""
        reason = Text(derived.reason).append(f" [{derived.rule}]" if derived.rule else "", style="dim")
        table.add_row(name + mark, as_text(derived.value), reason)
    console.print(table)
    for warning in interview.derivation.warnings:
        rule = f" [{warning['rule']}]" if warning["rule"] else ""
        console.print(f"\nwarning: {warning['text']}{rule}", style="yellow" if console.is_terminal else None)
    sys.stdout.flush()


def equivalent_command(answers: Answers) -> str:
    """The `crumb plan` line that gives the same plan."""
    parts = ["crumb plan", "--images", answers.images, "--base", answers.base, "--subject", answers.subject]
    for option, value, default in (
        ("--look", answers.look, Answers.look), ("--trigger", answers.trigger, ""), ("--class", answers.class_word, ""),
        ("--name", answers.name, ""), ("--gpu", answers.gpu, Answers.gpu), ("--vae", answers.vae, ""),
        ("--prediction", answers.prediction, ""),
    ):
        if value != default:
            parts += [option, value]
    if answers.vram_gib is not None:
        parts += ["--vram", f"{answers.vram_gib:g}"]
    parts += [option for option, given in (("--flip", answers.flip), ("--skip-broken", answers.skip_broken)) if given]
    for name, value in answers.overrides.items():
        if name == "subsets":
            parts += [part for table in value for part in ("--subset", subset_as_text(table))]
        else:
            parts += ["--set", f"{name}={as_typed(value)}"]
    return " ".join([parts[0], *map(shlex.quote, parts[1:])])


def as_typed(value: Any) -> str:
    """A value in the form that --set and the wizard read back: TOML on one line, but text without its quotes."""
    return value if isinstance(value, str) else toml_value(value, one_line=True).as_string()
