"""The interview's questions: one table, asked by the full-screen wizard and by the line-by-line one alike.

A question is only asked where the program can't answer it itself: `when` looks at what the files have told so far.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from crumb.engine.run.directory import check_run_name, runs_folder
from crumb.profiles.answers import Answers
from crumb.profiles.base_model import BaseModel, check_vae, hints_v_prediction, inspect_base_model
from crumb.profiles.data_rules import class_word_for
from crumb.profiles.dataset import Scan
from crumb.profiles.derive import COUNT_RANGE
from crumb.profiles.errors import RequestError
from crumb.profiles.hardware import resolve_gpu
from crumb.profiles.interview import default_name
from crumb.wizard.commands import unused_name

TOPICS = {"goal": "Goal", "pictures": "Pictures", "base": "Base model", "hardware": "Hardware", "review": "Review"}
"""The wizard's steps in order; a question names the one it belongs to."""

FORGOTTEN_WITH = {"images": ("skip_broken", "flip"), "base": ("vae", "prediction")}
"""Answers that say something about the file named in another answer, and end with it."""


@dataclass(frozen=True)
class Known:
    """What the named files turned out to hold; None until they were looked at."""

    scan: Scan | None = None
    base: BaseModel | None = None


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question. `kind`: text | choice | path | number | yes-no; `choices`: (value, label).

    `default` is what an empty answer means, in words or as the value of a choice; `check` gives an error sentence
    or "".
    """

    key: str
    topic: str
    title: str
    help: str
    more: str
    kind: str = "text"
    choices: tuple[tuple[Any, str], ...] = ()
    default: Callable[[Answers], Any] = lambda answers: ""
    check: Callable[[Any, Answers], str] = lambda value, answers: ""
    when: Callable[[Answers, Known], bool] = lambda answers, known: True


def questions_of(topic: str) -> list[Question]:
    return [question for question in QUESTIONS if question.topic == topic]


def read_answer(question: Question, text: Any, answers: Answers) -> Any:
    """What was typed or chosen as the answer's value; RequestError with the sentence to show where it won't do."""
    value = text.strip() if isinstance(text, str) else text
    if question.kind == "number":
        try:
            value = float(value) if value else None
        except ValueError:
            raise RequestError(f"{value!r} is no number. Type digits, such as 8, or leave it empty.") from None
    elif question.kind == "path" and value:
        value = str(Path(value.strip("'\"")).expanduser().absolute())
    elif question.choices and value not in [choice for choice, _ in question.choices]:
        allowed = ", ".join(label for _, label in question.choices)
        raise RequestError(f"{value!r} is not among the choices. Choose one of {allowed}.")
    sentence = question.check(value, answers)
    if sentence:
        raise RequestError(sentence)
    return value


def with_answer(answers: Answers, key: str, value: Any) -> Answers:
    """The answers with one more; those that hung on the old value are forgotten."""
    if getattr(answers, key) == value:
        return answers
    stale = {name: getattr(Answers(), name) for name in FORGOTTEN_WITH.get(key, ())}
    return replace(answers, **{**stale, key: value})


def open_point(topic: str, answers: Answers, known: Known) -> tuple[str, str] | None:
    """The first (key, sentence) that keeps the person on this step; None when they can go on."""
    if topic == "pictures" and known.scan and _has_broken(answers, known) and not answers.skip_broken:
        return "skip_broken", "Some pictures can't be used. Say yes to leave them out, or mend them and press F5."
    if topic == "base" and known.base:
        if not known.base.has_vae and not answers.vae:
            return "vae", "This base has no VAE baked in. Name a VAE file."
        if _prediction_is_open(answers, known) and not answers.prediction:
            return "prediction", "Choose what the base predicts."
    return None


def _sentence(look: Callable[[], Any]) -> str:
    try:
        look()
    except RequestError as error:
        return str(error)
    return ""


def _check_images(value: str, answers: Answers) -> str:
    if not value:
        return "Type the folder that holds your pictures."
    if not Path(value).exists():
        return f"There is no folder {value}. Check the path."
    return "" if Path(value).is_dir() else f"{value} is a file. Type the folder it is in: {Path(value).parent}"


def _check_base(value: str, answers: Answers) -> str:
    if not value:
        return "Type the path of an SDXL .safetensors file or a diffusers folder."
    return _sentence(lambda: inspect_base_model(Path(value)))


def _check_trigger(value: str, answers: Answers) -> str:
    if "," in value:
        return "A comma separates tags. Use one word without it."
    return "" if len(value) <= 60 else "That is too long for a trigger word. Use one short made-up word."


def _check_name(value: str, answers: Answers) -> str:
    if not value:
        return ""
    if (runs_folder() / value).exists():
        return f"A run called {value!r} is there already. {unused_name(value)!r} is free."
    return _sentence(lambda: check_run_name(value))


def _check_vram(value: float | None, answers: Answers) -> str:
    return _sentence(lambda: resolve_gpu(answers.gpu, value))


def _has_broken(answers: Answers, known: Known) -> bool:
    return bool(known.scan) and any(problem.fatal for problem in known.scan.problems)


def _lacks_captions(answers: Answers, known: Known) -> bool:
    return bool(known.scan) and any(picture.caption is None for picture in known.scan.pictures)


def _prediction_is_open(answers: Answers, known: Known) -> bool:
    return bool(known.base) and known.base.prediction_type is None


def _range(subject: str) -> str:
    low, high = COUNT_RANGE[subject]
    return f"{low} to {high}"


QUESTIONS = (
    Question(
        key="subject", topic="goal", title="What will it learn?", kind="choice",
        choices=tuple((subject, subject) for subject in COUNT_RANGE),
        default=lambda answers: Answers.subject,
        help="Sets how many pictures are wanted, the rank, and how long to train.",
        more=f"Pictures wanted: character or face {_range('character')}, style {_range('style')}, concept "
             f"{_range('concept')} (rule DATA-COUNT). Other numbers work too, with a warning. A face set should fill the "
             f"frame, from all angles, with many expressions and different light.",
    ),
    Question(
        key="look", topic="goal", title="How do the pictures look?", kind="choice",
        choices=(("realistic", "realistic"), ("anime", "anime or drawn")),
        default=lambda answers: Answers.look,
        help="Drawn pictures are less complex, so half the rank is enough.",
        more="Rank is the capacity of the LoRA. Flat, drawn art needs less of it than photographs (rule RANK-RANGE): a "
             "smaller file that learns less of what was not meant.",
    ),
    Question(
        key="trigger", topic="goal", title="Trigger word", check=_check_trigger,
        default=lambda answers: "none: it acts whenever it is loaded",
        help="A rare made-up word that will call it, such as ohwx. May be empty.",
        more="It is put before every caption that lacks it. Choose one that is in no dictionary, or the model mixes it "
             "with what the word means already (rule TAG-TRIGGER).",
    ),
    Question(
        key="name", topic="goal", title="Run name", check=_check_name,
        default=lambda answers: unused_name(default_name(answers)) if answers.trigger or answers.images
        else "the pictures' folder",
        help="Names the run's folder, the file, and the word in <lora:NAME:1>.",
        more="Letters, digits, '-', '_' and '.'; at most 80. An existing run is never written over.",
    ),
    Question(
        key="images", topic="pictures", title="Folder of pictures", kind="path", check=_check_images,
        help="Captions may lie beside them as .txt. Nothing in it is changed.",
        more="Sub-folders are read as well; a name like 10_cat means 10 repeats of what is inside (as kohya's tools do). "
             "The right arrow key takes the proposed path. F5 reads the folder again.",
    ),
    Question(
        key="skip_broken", topic="pictures", title="Leave out what can't be used?", kind="yes-no",
        choices=((False, "no"), (True, "yes")), default=lambda answers: False, when=_has_broken,
        help="The files named below can't be used. Yes trains without them.",
        more="They are never changed or deleted. Copy them again or save them as PNG, then press F5 to read the folder "
             "again.",
    ),
    Question(
        key="class_word", topic="pictures", title="The subject in one common word", when=_lacks_captions,
        default=class_word_for,
        help="Stands in for missing captions, after the trigger word: ohwx person.",
        more="Pictures without a caption are trained with the trigger and this word. Whatever the caption does not "
             "name is learned as part of the subject (rule TAG-BIND).",
    ),
    Question(
        key="flip", topic="pictures", title="May pictures be mirrored?", kind="yes-no",
        choices=((False, "no"), (True, "yes")), default=lambda answers: False,
        help="No where text, a logo, an uneven face or a parting has its side.",
        more="Half of the views are then shown mirrored, so a small set has more to show. But letters come out reversed, and "
             "a scar, a parting or a one-sided outfit is learned on both sides. Styles and symmetric things gain most.",
    ),
    Question(
        key="base", topic="base", title="Base model", kind="path", check=_check_base,
        help="An SDXL .safetensors file or a diffusers folder. Only headers are read.",
        more="The LoRA works best on the model it was trained on and its relatives. Pickled files (.ckpt, .pt) are refused: "
             "opening one can run any program in it.",
    ),
    Question(
        key="vae", topic="base", title="VAE file", kind="path",
        check=lambda value, answers: _sentence(lambda: check_vae(value)) if value else "",
        when=lambda answers, known: bool(known.base) and not known.base.has_vae,
        help="This base has no VAE baked in. Any SDXL VAE will do.",
        more="The VAE turns pictures into the latents that training works on. It is used once for each picture and does "
             "not become part of the LoRA.",
    ),
    Question(
        key="prediction", topic="base", title="What does the base predict?", kind="choice",
        choices=(("epsilon", "noise (epsilon)"), ("v_prediction", "velocity (v_prediction)")),
        default=lambda answers: "v_prediction" if hints_v_prediction(answers.base) else "epsilon", when=_prediction_is_open,
        help="The file does not say. Its page does; nearly all predict noise.",
        more="Trained the wrong way the LoRA is ruined. Models that predict velocity say v-pred in their name or on their "
             "page; what a name hints at is marked here beforehand.",
    ),
    Question(
        key="gpu", topic="hardware", title="Graphics card",
        default=lambda answers: Answers.gpu,
        check=lambda value, answers: _sentence(lambda: resolve_gpu(value or Answers.gpu, None)),
        help="auto: the one in this machine. Or cpu, or the name of another card.",
        more="A plan for another card can be written here and trained there. Names such as 'RTX 3060 12GB' or '4070 Ti' are "
             "understood.",
    ),
    Question(
        key="vram_gib", topic="hardware", title="Its memory in GiB", kind="number", check=_check_vram,
        default=lambda answers: "all that the card has",
        help="Give less to leave room for other programs. Decides what is kept.",
        more="Below 16 GiB activations are recomputed: about a third slower, much smaller. Below 12 GiB the optimizer keeps "
             "8-bit states and the VAE works in tiles.",
    ),
)
