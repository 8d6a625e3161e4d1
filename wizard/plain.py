"""The wizard line by line, for terminals without a movable cursor: the same questions, plain prompts."""

import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

from crumb.engine.run.directory import create_run
from crumb.profiles.answers import Answers
from crumb.profiles.base_model import inspect_base_model
from crumb.profiles.dataset import Scan
from crumb.profiles.errors import RequestError
from crumb.profiles.hardware import detect_gpu, resolve_gpu
from crumb.profiles.interview import Interview, check_override, conclude, default_name
from crumb.wizard.commands import age_in_words, start_and_watch, unused_name
from crumb.wizard.draft import drop_draft, load_draft, save_draft
from crumb.wizard.facts import describe_base, describe_gpu, describe_scan
from crumb.wizard.planning import (
    equivalent_command,
    print_plan,
    scan_showing_progress,
    write_plan,
)
from crumb.wizard.questions import TOPICS, Known, Question, open_point, questions_of, read_answer, with_answer


def interview(ascii: bool) -> int:
    """Asks, shows the plan, and starts the run if the person says so."""
    try:
        answers, known = _answer_all(_first_answers())
        return _review(answers, known, ascii)
    except EOFError:
        raise RequestError("The input ended before the last question. The answers so far are kept; `crumb --plain` goes "
                           "on with them.") from None


def _first_answers() -> Answers:
    draft = load_draft()
    if draft:
        age = age_in_words(time.time() - draft.saved)
        if _ask_yes(f"Go on with the answers of {age} ago ({draft.answers.trigger or draft.answers.images or 'unnamed'})?"):
            return draft.answers
    return Answers()


def _answer_all(answers: Answers) -> tuple[Answers, Known]:
    known = Known()
    for topic in list(TOPICS)[:-1]:
        print(f"\n== {TOPICS[topic]}")
        for question in questions_of(topic):
            if not question.when(answers, known):
                continue
            while True:
                answers, known = _ask(question, answers, known)
                point = open_point(topic, answers, known)
                if not point or point[0] != question.key:
                    break
                print(f"! {point[1]}")
    return answers, known


def _ask(question: Question, answers: Answers, known: Known) -> tuple[Answers, Known]:
    """Repeats one question until its answer can stand; then what follows from it is looked up and shown."""
    present = getattr(answers, question.key)
    if question.key == "gpu":
        gpu = detect_gpu()
        print("\n".join(describe_gpu(gpu, True)) if gpu else "No NVIDIA card was found in this machine.")
    print(f"\n{question.title}: {question.help}")
    while True:
        text = input(f"{_prompt(question, answers)} ").strip()
        try:
            value = read_answer(question, _chosen(question, text, present, answers), answers)
            accepted = with_answer(answers, question.key, value)
            known = _learn(question, accepted, known)
        except RequestError as error:
            print(f"! {error}")
            continue
        save_draft(accepted, question.topic)
        return accepted, known


def _prompt(question: Question, answers: Answers) -> str:
    present = getattr(answers, question.key)
    if question.choices:
        number = [value for value, _ in question.choices].index(present if present != "" else question.default(answers)) + 1
        return ", ".join(f"{n} {label}" for n, (_, label) in enumerate(question.choices, 1)) + f" [{number}]:"
    return f"[{present or question.default(answers)}]:" if present or question.default(answers) else ">"


def _chosen(question: Question, text: str, present: Any, answers: Answers) -> Any:
    """An empty line keeps what stands; choices are taken by number or word."""
    if not question.choices:
        return text or ("" if present is None else str(present))
    if not text:
        return present if present != "" else question.default(answers)
    for number, (value, label) in enumerate(question.choices, 1):
        if text.lower() in (str(number), label.lower(), str(value).lower(), label[0].lower()):
            return value
    return text


def _learn(question: Question, answers: Answers, known: Known) -> Known:
    if question.key == "images":
        known = replace(known, scan=scan_showing_progress(answers))
        print("\n".join(describe_scan(known.scan, 1024)))
    if question.key == "base":
        known = replace(known, base=inspect_base_model(Path(answers.base)))
        print("\n".join(describe_base(known.base)))
    if question.key == "vram_gib":
        print("\n".join(describe_gpu(resolve_gpu(answers.gpu, answers.vram_gib), answers.gpu == "auto")))
    return known


def _review(answers: Answers, known: Known, ascii: bool) -> int:
    answers = replace(answers, name=answers.name or unused_name(default_name(answers)))
    print(f"\n== {TOPICS['review']}\n")
    result = conclude(answers, known.scan)
    print_plan(result)
    while True:
        print(f"\nThe same again without questions:\n  {equivalent_command(answers)}")
        text = input("\nEnter starts the run; KEY=VALUE changes a setting; w writes the plan only; q leaves: ").strip()
        if not text:
            return _start(result, ascii)
        if text in ("q", "quit"):
            print("The answers are kept. `crumb --plain` goes on with them.")
            return 0
        try:
            if text == "w":
                return _write(result)
            answers, result = _change(text, answers, result.scan)
        except RequestError as error:
            print(f"! {error}")


def _change(text: str, answers: Answers, scan: Scan) -> tuple[Answers, Interview]:
    key, equals, value = (part.strip() for part in text.partition("="))
    if not equals:
        raise RequestError(f"{text!r} is neither Enter, w, q nor KEY=VALUE, such as rank=16.")
    overrides = {**answers.overrides, key: check_override(key, value)}
    changed = replace(answers, overrides=overrides)
    result = conclude(changed, scan)
    save_draft(changed, "review")
    print_plan(result)
    return changed, result


def _write(result: Interview) -> int:
    path = Path("plan.toml")
    if path.exists():
        raise RequestError(f"{path} exists already. Move it away first.")
    write_plan(result, path)
    drop_draft()
    print(f"Wrote {path}. Next:  crumb train {path}")
    return 0


def _start(result: Interview, ascii: bool) -> int:
    run = create_run(result.plan.name, result.toml())
    drop_draft()
    return start_and_watch(run, Namespace(detach=False, plain=True, ascii=ascii))


def _ask_yes(question: str) -> bool:
    return input(f"{question} [Y/n] ").strip().lower() in ("", "y", "yes")
