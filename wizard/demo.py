"""`crumb demo`: the whole road on packaged pictures and a small packaged base, so that it needs no download and no GPU.

The base has SDXL's structure and learned emoji by name; the style set is in ink and wash, the character set one blue cat.
"""

import shlex
from pathlib import Path

from crumb.engine.run.demo import demo_folder, write_demo_base
from crumb.engine.run.directory import RunDirectory, create_run, read_state
from crumb.engine.run.lora_files import judgings
from crumb.profiles.answers import Answers
from crumb.profiles.derivation import Derived
from crumb.profiles.interview import Interview, check_override, conclude
from crumb.profiles.paths import cache_dir
from crumb.wizard.commands import start_and_watch, unused_name
from crumb.wizard.planning import print_plan

PICTURES_CELLS = 76
# What keeps the demo within three minutes on two cores; a set of one's own trains as long as the rules say.
STEPS = {"style": 300, "character": 200}
SAMPLE_EVERY, SAVE_EVERY = 150, 50
# The base learned its pictures well and wants little guidance; more burns them in.
GUIDANCE = 3.0

SHOWN = ["mixed_precision", "rank", "alpha", "optimizer", "learning_rate", "resolution", "steps", "save_every"]

TRIGGER = "crumbdemo"
TAUGHT = {
    "style": "how to draw in ink and wash, from {count} small drawings. It knows emoji in colour only.",
    "character": "one blue cat, from {count} of its faces. The cats it knows are yellow.",
}
# Those of the style are not in its set: what changes in them was understood, not memorised.
SAMPLE_SUBJECTS = {
    "style": ["red apple", "automobile", "soccer ball", "penguin"],
    "character": ["cat face", "crying cat", "pouting cat", "dog face"],
}


WHAT_TO_SEE = {
    "style": "None of these four was in the set: it learned the style, not the pictures.",
    "character": "The cats took on the new colour. The dog was not taught: what changed in it has spilled over.",
}
LINES_BELOW_SHEET = 14


def demo(options) -> int:
    """`crumb demo`."""
    from rich.console import Console

    base = write_demo_base(cache_dir() / "demo")
    interview = plan_demo(base, demo_folder(options.subject), options)
    console = Console(highlight=False, markup=False)
    taught = TAUGHT[options.subject].format(count=len(interview.scan.pictures))
    console.print(f"This teaches a small packaged base model {taught} Everything is real, only small and short: 128 pixels, "
                  f"and fewer steps than the rules give a set of your own.\n")
    print_plan(interview, SHOWN)
    print(flush=True)
    run = create_run(interview.plan.name, interview.toml())
    code = start_and_watch(run, options)
    if read_state(run)["state"] == "done":
        show_outcome(run, options)
    return code


def plan_demo(base: Path, pictures: Path, options) -> Interview:
    """Every value is derived, as for any set, but the length and the prompts."""
    prompts = [f"{TRIGGER}, {subject}" for subject in SAMPLE_SUBJECTS[options.subject]]
    steps = check_override("steps", options.steps) if options.steps else STEPS[options.subject]
    overrides = {"sample_prompts": prompts, "steps": steps, "sample_every": SAMPLE_EVERY,
                 "save_every": SAVE_EVERY, "sample_guidance": GUIDANCE}
    interview = conclude(Answers(images=str(pictures), base=str(base), subject=options.subject, trigger=TRIGGER,
                                 name=unused_name("demo"), overrides=overrides))
    if not options.steps:
        interview.derivation.values["steps"] = Derived(steps, "", "the demo's own length, for three minutes in all")
    return interview


def show_outcome(run: RunDirectory, options) -> None:
    """Before and after, the file, and what to type next."""
    from rich.console import Console

    from crumb.wizard.dashboard.pictures import before_after, can_show_pictures, graphics, save_before_after

    columns = sample_pairs(run, SAMPLE_SUBJECTS[options.subject])
    if columns:
        sheet = run.path / "before-after.png"
        save_before_after(columns, sheet)
        console = Console(highlight=False)
        width = min(console.width, PICTURES_CELLS)
        print("\nBefore (above) and after (below), same seeds:")
        shown = can_show_pictures(console, options.ascii)
        max_lines = max(4, (console.height - LINES_BELOW_SHEET) // 2)
        console.print((graphics(sheet, width) if shown else None) or before_after(columns, width, options.ascii, max_lines))
        console.print(WHAT_TO_SEE[options.subject])
        print(f"In full: {sheet}")
    say_held_out(run)
    print(f"\nYour LoRA: {run.result}")
    print(f"\nWith your own pictures, either of these:\n"
          f"  crumb\n"
          f"  crumb plan --images DIR --base FILE --subject {options.subject} --trigger WORD\n"
          f"Check any LoRA with:  crumb verify {shlex.quote(str(run.result))}")


def say_held_out(run: RunDirectory) -> None:
    """How the loss fell on pictures that were kept from training."""
    judged = list(judgings(run).values())
    if judged and judged[-1].held_out_loss is not None:
        print(f"\nLoss on pictures it was never shown: {judged[0].held_out_loss:.3f} before, "
              f"{judged[-1].held_out_loss:.3f} after.")


def sample_pairs(run: RunDirectory, labels: list[str]) -> list[tuple[str, Path, Path]]:
    """(label, first picture, last picture) of each prompt that has two different ones."""
    pairs = []
    for index, label in enumerate(labels):
        pictures = sorted(run.samples.glob(f"step-*-{index}.png"))
        if len(pictures) > 1:
            pairs.append((label, pictures[0], pictures[-1]))
    return pairs
