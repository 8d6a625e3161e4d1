"""The command line: which commands there are, what each takes, and the exit codes.

Separate from what the commands do, so that `crumb --help` answers before anything heavy is imported.
"""

import argparse
import importlib
import io
import os
import sys

from crumb.profiles.answers import LOOKS, SUBJECTS, Answers
from crumb.profiles.errors import CrumbError

EXIT_CODES = "exit codes: 0 done, 1 the run failed, 2 the request was wrong, 3 stopped on request, 75 busy now"
MAX_STRENGTH = 5
MAX_GPUS = 64


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns its exit code; a person's mistake gives one sentence, never a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # file names may hold letters that this terminal can't show
            stream.reconfigure(errors="backslashreplace")
    options = build_parser().parse_args(arguments)
    command = getattr(importlib.import_module(f"crumb.wizard.{options.module}"), options.function)
    try:
        return command(options)
    except CrumbError as error:
        print(f"crumb: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("crumb: interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `crumb runs | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def build_parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--ascii", action="store_true", default=argparse.SUPPRESS,
                        help="draw with plain ASCII letters only")
    parser = argparse.ArgumentParser(
        prog="crumb", parents=[shared], allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Trains SDXL LoRAs on small GPUs. Without a command: the wizard, which asks a few questions,\n"
                    "shows every setting with its reason and starts the run.",
        epilog=f"example: crumb demo          try the whole road, no files needed\n\n{EXIT_CODES}",
    )
    parser.set_defaults(module="start", function="start", ascii=False)
    parser.add_argument("--plain", action="store_true", help="ask the wizard's questions line by line")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    def add(name: str, help: str, example: str, *, module: str = "commands") -> argparse.ArgumentParser:
        command = commands.add_parser(
            name, parents=[shared], allow_abbrev=False, help=help, description=f"{help[0].upper()}{help[1:]}.",
            epilog=f"example: {example}", formatter_class=argparse.RawDescriptionHelpFormatter)
        command.set_defaults(module=module, function=name)
        return command

    _add_plan(add)
    _add_training(add)
    _add_runs(add)
    _add_sheet(add)
    _add_checks(add)
    _add_exchange(add)
    return parser


def _add_plan(add) -> None:
    plan = add("plan", "derive every setting from a few answers and write a plan file",
               "crumb plan --images photos --subject face --base sd_xl_base_1.0.safetensors --trigger ohwx",
               module="planning")
    plan.add_argument("--images", metavar="DIR", required=True, help="folder of pictures, captions beside them")
    plan.add_argument("--base", metavar="PATH", required=True, help="SDXL .safetensors file or diffusers folder")
    _add_answers(plan)
    plan.add_argument("--json", action="store_true", help="print the derived values as one JSON object")


def _add_answers(command: argparse.ArgumentParser) -> None:
    """What a plan follows from, and where it goes."""
    command.add_argument("--subject", choices=SUBJECTS, default=Answers.subject, help="what it learns (default: %(default)s)")
    command.add_argument("--look", choices=LOOKS, default=Answers.look, help="look of the pictures (default: %(default)s)")
    command.add_argument("--trigger", metavar="WORD", default="", help="rare made-up word that will call the LoRA")
    command.add_argument("--class", metavar="WORD", default="", dest="class_word",
                         help="the subject in one common word, used where captions are missing")
    command.add_argument("--name", default="", help="run name (default: the trigger, else the folder's name)")
    command.add_argument("--gpu", metavar="NAME", default=Answers.gpu,
                         help="card to plan for: auto, cpu or a name such as 'RTX 3060' (default: auto)")
    command.add_argument("--vram", metavar="GIB", type=_gib, dest="vram_gib", help="its memory, where the name leaves it open")
    command.add_argument("--vae", metavar="FILE", default="", help="a VAE to use instead of the base's own")
    command.add_argument("--prediction", choices=("epsilon", "v_prediction"), default="",
                         help="what the base predicts, where its file does not say")
    command.add_argument("--flip", action="store_true", help="pictures may be mirrored: no text, no side that matters")
    command.add_argument("--subset", metavar="images=DIR,KEY=VALUE", action="append", default=[], dest="subsets",
                         help="a further folder with settings of its own, such as repeats=3; may be given many times")
    command.add_argument("--skip-broken", action="store_true", help="train without the pictures that can't be read")
    command.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], dest="settings",
                         help="fix a setting yourself, such as rank=16; may be given many times")
    command.add_argument("--out", metavar="FILE", help="plan file to write (default: plan.toml; with --json: none)")
    command.add_argument("--force", action="store_true", help="write over an existing plan file")


def _add_exchange(add) -> None:
    taken = add("import", "make a plan from settings of sd-scripts (.toml) or a kohya_ss preset (.json)",
                "crumb import preset.json --images photos --base sd_xl_base_1.0.safetensors", module="kohya")
    taken.set_defaults(function="import_settings")
    taken.add_argument("file", metavar="FILE", help="settings file of sd-scripts, or preset of the kohya_ss GUI")
    taken.add_argument("--images", metavar="DIR", default="", help="folder of pictures (default: the one that FILE names)")
    taken.add_argument("--base", metavar="PATH", default="", help="SDXL base model (default: the one that FILE names)")
    taken.add_argument("--dataset-config", metavar="FILE", help="dataset file of sd-scripts that belongs to it")
    _add_answers(taken)
    given = add("export", "write a plan as settings of another trainer", "crumb export plan.toml --to kohya --out kohya.toml",
                module="kohya")
    given.set_defaults(function="export_settings")
    given.add_argument("plan", metavar="PLAN.toml", help="plan file, as `crumb plan` writes it")
    given.add_argument("--to", choices=("kohya",), required=True, help="kohya: sd-scripts' sdxl_train_network.py")
    given.add_argument("--out", metavar="FILE.toml", help="settings file to write (default: PLAN-kohya.toml); folders and "
                                                          "prompts go into FILE-dataset.toml and FILE-prompts.toml beside it")
    given.add_argument("--force", action="store_true", help="write over existing files")
    for command in (taken, given):
        command.add_argument("--json", action="store_true", help="print what became of each setting as one JSON object")


def _add_training(add) -> None:
    demo = add("demo", "train for real on a small packaged base and packaged pictures, in minutes, GPU or not",
               "crumb demo --subject character", module="demo")
    demo.add_argument("--steps", metavar="N", help="optimizer steps (default: what fits three minutes on two cores)")
    demo.add_argument("--subject", choices=("style", "character"), default="style",
                      help="what it learns (default: %(default)s)")
    train = add("train", "train a plan and watch it", "crumb train plan.toml --detach")
    train.add_argument("plan", metavar="PLAN.toml", help="plan file, as `crumb plan` writes it")
    resume = add("resume", "go on with a stopped, failed or lost run from its last checkpoint", "crumb resume ohwx")
    resume.add_argument("name", metavar="RUN", help="run name or folder")
    for command in (train, resume):
        command.add_argument("--gpus", metavar="N", type=_count,
                             help="share each step among N GPUs of this machine (default: 1, or as the run had before; "
                                  "docs/parallel.md)")
    for command in (demo, train, resume):
        command.add_argument("--detach", action="store_true", help="start it and return at once")
        command.add_argument("--plain", action="store_true", help="print lines instead of a dashboard")


def _add_runs(add) -> None:
    watch = add("watch", "watch a run; leaving never touches it", "crumb watch ohwx")
    watch.add_argument("name", metavar="RUN", nargs="?", help="run name or folder (default: the one used last)")
    watch.add_argument("--plain", action="store_true", help="print lines instead of a dashboard")
    runs = add("runs", "list all runs with their state", "crumb runs --json")
    runs.add_argument("--json", action="store_true", help="print a JSON list")
    stop = add("stop", "ask a run to stop after its present step, with everything saved", "crumb stop ohwx")
    sample = add("sample", "ask a run for sample pictures now", "crumb sample ohwx")
    for command in (stop, sample):
        command.add_argument("name", metavar="RUN", help="run name or folder")


def _add_sheet(add) -> None:
    sheet = add("sheet", "draw every checkpoint of a run at several strengths into one picture, to choose the file to keep",
                "crumb sheet ohwx --strengths 0.6,0.8,1.0 --prompts \"ohwx cat --d 7\"", module="sheet")
    sheet.add_argument("name", metavar="RUN", help="run name or folder")
    sheet.add_argument("--strengths", metavar="LIST", type=_strengths, default=[0.4, 0.6, 0.8, 1.0, 1.2],
                       help="strengths of the LoRA, with commas between (default: 0.4,0.6,0.8,1.0,1.2)")
    sheet.add_argument("--prompts", metavar="PROMPT", nargs="+",
                       help="a number: the first of the plan's sample prompts; else new ones, each in quotes, with the options "
                            "of sample prompts (--n, --d, --w, --h, --l, --s) at their end (default: all of the plan's)")
    sheet.add_argument("--steps", metavar="N", help="denoising steps of every picture (default: as the plan says)")
    sheet.add_argument("--out", metavar="FILE.png", help="picture to write (default: sheet.png in the run's folder)")
    sheet.add_argument("--plain", action="store_true", help="print lines, and no picture")


def _add_checks(add) -> None:
    verify = add("verify", "check that a LoRA file will load everywhere", "crumb verify runs/ohwx/ohwx.safetensors")
    verify.add_argument("file", metavar="FILE", help="LoRA .safetensors file")
    doctor = add("doctor", "show what this machine can do", "crumb doctor", module="doctor")
    for command in (verify, doctor):
        command.add_argument("--json", action="store_true", help="print one JSON object")


def _strengths(text: str) -> list[float]:
    try:
        # Without 0: the base model alone is the first column anyway.
        strengths = [strength for strength in dict.fromkeys(float(part) for part in text.split(",")) if strength]
    except ValueError:
        strengths = []
    if not strengths or not all(-MAX_STRENGTH <= strength <= MAX_STRENGTH for strength in strengths):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of strengths; give numbers from -{MAX_STRENGTH} to "
                                         f"{MAX_STRENGTH} with commas between, such as 0.6,0.8,1.0")
    return strengths


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MAX_GPUS:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of GPUs; give a whole number from 1 to {MAX_GPUS}")
    return int(text)


def _gib(text: str) -> float:
    try:
        return float(text.lower().removesuffix("b").removesuffix("i").removesuffix("g"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no amount of memory; give GiB as a number, such as 8") from None
