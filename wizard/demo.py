"""`crumb demo`: the whole road on packaged pictures and a tiny base made on the spot, so that it needs no download.

The base has SDXL's structure with small widths and random weights: the run is real, the pictures are noise.
"""

import shlex
import subprocess
import sys
from importlib.resources import as_file, files
from pathlib import Path

from crumb.engine.run.directory import RunDirectory, create_run, read_state
from crumb.profiles.answers import Answers
from crumb.profiles.errors import CrumbError
from crumb.profiles.interview import Interview, check_override, conclude
from crumb.profiles.paths import cache_dir
from crumb.wizard.commands import start_and_watch, unused_name
from crumb.wizard.planning import print_plan

PICTURES_CELLS = 76

SHOWN = ["mixed_precision", "rank", "alpha", "optimizer", "learning_rate", "resolution", "steps", "save_every"]


def demo(options) -> int:
    """`crumb demo`."""
    print("This trains a real LoRA with packaged pictures on a tiny made-up base of random weights.\n"
          "The pictures it draws are therefore noise: they show the road, not art.\n")
    base = make_base()
    with as_file(files("crumb.engine") / "demo" / "pictures") as pictures:
        interview = plan_demo(base, pictures, options)
        print_plan(interview, SHOWN)
        print(flush=True)
        run = create_run(interview.plan.name, interview.toml())
        code = start_and_watch(run, options)
    if read_state(run)["state"] == "done":
        show_outcome(run, options)
    return code


def make_base() -> Path:
    """The tiny base in the cache, made there by the engine when it is missing."""
    path = cache_dir() / "demo" / "tiny-sdxl.safetensors"
    if path.exists():
        return path
    path.parent.mkdir(exist_ok=True)
    print("Making the tiny base model (once) ...", flush=True)
    made = subprocess.run([sys.executable, "-P", "-m", "crumb.engine.model.tiny", str(path)],
                          capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if made.returncode:
        raise CrumbError(f"The tiny base model could not be made at {path}. Ask `crumb doctor` what is missing here. "
                         f"The last words were: {made.stderr.strip().splitlines()[-1:]}")
    return path


def plan_demo(base: Path, pictures: Path, options) -> Interview:
    """Every value is derived, as for any set; the few small pictures make it a matter of a minute or two."""
    overrides = {"steps": check_override("steps", options.steps)} if options.steps else {}
    return conclude(Answers(images=str(pictures), base=str(base), subject=options.subject, prediction="epsilon",
                            trigger="crumbdemo", name=unused_name("demo"), overrides=overrides))


def show_outcome(run: RunDirectory, options) -> None:
    """Before and after, the file, and what to type next."""
    from rich.console import Console

    from crumb.wizard.dashboard.pictures import before_after, can_show_pictures

    first = run.samples / "step-000000-0.png"
    last = max(run.samples.glob("step-*-0.png"), default=first)
    if first.exists() and last != first:
        console = Console(highlight=False)
        console.print("\nBefore and after, same prompt and seed:")
        console.print(before_after(first, last, min(console.width, PICTURES_CELLS), options.ascii))
        if can_show_pictures(console, options.ascii):
            print(f"In full: {first}\n         {last}")
    print(f"\nYour LoRA: {run.result}")
    print("\nWith your own pictures, either of these:\n"
          "  crumb\n"
          "  crumb plan --images DIR --base SDXL.safetensors --subject character --trigger WORD")
    print(f"Check any LoRA with:  crumb verify {shlex.quote(str(run.result))}")
