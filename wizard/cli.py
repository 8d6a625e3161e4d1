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
    _add_checks(add)
    return parser


def _add_plan(add) -> None:
    plan = add("plan", "derive every setting from a few answers and write a plan file",
               "crumb plan --images photos --subject face --base sd_xl_base_1.0.safetensors --trigger ohwx",
               module="planning")
    plan.add_argument("--images", metavar="DIR", required=True, help="folder of pictures, captions beside them")
    plan.add_argument("--base", metavar="PATH", required=True, help="SDXL .safetensors file or diffusers folder")
    plan.add_argument("--subject", choices=SUBJECTS, default=Answers.subject, help="what it learns (default: %(default)s)")
    plan.add_argument("--look", choices=LOOKS, default=Answers.look, help="look of the pictures (default: %(default)s)")
    plan.add_argument("--trigger", metavar="WORD", default="", help="rare made-up word that will call the LoRA")
    plan.add_argument("--class", metavar="WORD", default="", dest="class_word",
                      help="the subject in one common word, used where captions are missing")
    plan.add_argument("--name", default="", help="run name (default: the trigger, else the folder's name)")
    plan.add_argument("--gpu", metavar="NAME", default=Answers.gpu,
                      help="card to plan for: auto, cpu or a name such as 'RTX 3060' (default: auto)")
    plan.add_argument("--vram", metavar="GIB", type=_gib, dest="vram_gib", help="its memory, where the name leaves it open")
    plan.add_argument("--vae", metavar="FILE", default="", help="a VAE to use instead of the base's own")
    plan.add_argument("--prediction", choices=("epsilon", "v_prediction"), default="",
                      help="what the base predicts, where its file does not say")
    plan.add_argument("--flip", action="store_true", help="pictures may be mirrored: no text, no side that matters")
    plan.add_argument("--subset", metavar="images=DIR,KEY=VALUE", action="append", default=[], dest="subsets",
                      help="a further folder with settings of its own, such as repeats=3; may be given many times")
    plan.add_argument("--skip-broken", action="store_true", help="train without the pictures that can't be read")
    plan.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], dest="settings",
                      help="fix a setting yourself, such as rank=16; may be given many times")
    plan.add_argument("--out", metavar="FILE", help="plan file to write (default: plan.toml; with --json: none)")
    plan.add_argument("--force", action="store_true", help="write over an existing plan file")
    plan.add_argument("--json", action="store_true", help="print the derived values as one JSON object")


def _add_training(add) -> None:
    demo = add("demo", "train for real on a small packaged base and packaged pictures, in minutes, GPU or not",
               "crumb demo --subject character", module="demo")
    demo.add_argument("--steps", metavar="N", help="optimizer steps (default: about two minutes' worth)")
    demo.add_argument("--subject", choices=("style", "character"), default="style",
                      help="what it learns (default: %(default)s)")
    train = add("train", "train a plan and watch it", "crumb train plan.toml --detach")
    train.add_argument("plan", metavar="PLAN.toml", help="plan file, as `crumb plan` writes it")
    resume = add("resume", "go on with a stopped, failed or lost run from its last checkpoint", "crumb resume ohwx")
    resume.add_argument("name", metavar="RUN", help="run name or folder")
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


def _add_checks(add) -> None:
    verify = add("verify", "check that a LoRA file will load everywhere", "crumb verify runs/ohwx/ohwx.safetensors")
    verify.add_argument("file", metavar="FILE", help="LoRA .safetensors file")
    doctor = add("doctor", "show what this machine can do", "crumb doctor", module="doctor")
    for command in (verify, doctor):
        command.add_argument("--json", action="store_true", help="print one JSON object")


def _gib(text: str) -> float:
    try:
        return float(text.lower().removesuffix("b").removesuffix("i").removesuffix("g"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no amount of memory; give GiB as a number, such as 8") from None
