"""The question table, the draft, and what follows from one answer to the next."""

import json
import os
from dataclasses import fields, replace
from pathlib import Path

import pytest
from rich.cells import cell_len

from crumb.profiles.answers import Answers
from crumb.profiles.base_model import inspect_base_model
from crumb.profiles.dataset import scan_pictures
from crumb.profiles.errors import RequestError
from crumb.profiles.paths import state_dir
from crumb.wizard.draft import drop_draft, load_draft, save_draft
from crumb.wizard.planning import answers_from, equivalent_command
from crumb.wizard.questions import QUESTIONS, TOPICS, Known, open_point, read_answer, with_answer

BY_KEY = {question.key: question for question in QUESTIONS}


def test_every_question_fits_the_narrow_screen_and_names_an_answer():
    known = {field.name for field in fields(Answers)}
    for question in QUESTIONS:
        assert question.key in known and question.topic in TOPICS
        assert cell_len(question.title) <= 40, question.title
        assert cell_len(question.help) <= 73, f"{question.key}: {cell_len(question.help)} cells wrap at 80 columns"


def asked(topic, answers, known):
    return [question.key for question in QUESTIONS if question.topic == topic and question.when(answers, known)]


def test_only_what_the_files_leave_open_is_asked(tiny_base, photographs, tmp_path):
    scan, unmarked = scan_pictures(photographs), inspect_base_model(tiny_base)
    base = replace(unmarked, prediction_type="epsilon")
    known = Known(scan, base)
    assert asked("pictures", Answers(), known) == ["images", "flip"]
    assert asked("base", Answers(), known) == ["base"]

    bare = replace(scan, pictures=[replace(scan.pictures[0], caption=None)])
    assert asked("pictures", Answers(), Known(bare, base)) == ["images", "class_word", "flip"]
    assert asked("base", Answers(), Known(scan, replace(base, has_vae=False))) == ["base", "vae"]
    assert asked("base", Answers(), Known(scan, unmarked)) == ["base", "prediction"]
    assert open_point("base", Answers(), Known(scan, unmarked))[0] == "prediction"
    assert open_point("base", Answers(prediction="epsilon"), Known(scan, unmarked)) is None
    question = next(question for question in QUESTIONS if question.key == "prediction")
    assert question.default(Answers(base="/models/noob-vpred-1.0.safetensors")) == "v_prediction"
    assert question.default(Answers(base="/models/plain.safetensors")) == "epsilon"

    for file in photographs.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "coffee.jpg").write_bytes(b"not a picture")
    broken = Known(scan_pictures(tmp_path), base)
    assert asked("pictures", Answers(), broken) == ["images", "skip_broken", "flip"]
    assert open_point("pictures", Answers(), broken)[0] == "skip_broken"
    assert open_point("pictures", Answers(skip_broken=True), broken) is None


@pytest.mark.parametrize("key, text, words", [
    ("subject", "dragon", "character, face, style, concept"),
    ("trigger", "a, b", "comma"),
    ("name", "../up", "Use letters"),
    ("images", "/no/such/folder", "no folder"),
    ("base", "/no/such/base", "check the path"),
    ("gpu", "RTX 9999", "--gpu auto"),
    ("vram_gib", "a lot", "no number"),
    ("vram_gib", "-1", "can't be right"),
    ("vae", "/no/such/vae", "There is no VAE at"),
])
def test_wrong_answers_are_refused_with_the_mend(key, text, words):
    with pytest.raises(RequestError, match=words):
        read_answer(BY_KEY[key], text, Answers())


def test_answers_about_a_file_end_with_the_file():
    answers = Answers(base="a", vae="v", prediction="epsilon", images="p", skip_broken=True, flip=True)
    assert with_answer(answers, "base", "b") == replace(answers, base="b", vae="", prediction="")
    assert with_answer(answers, "images", "q") == replace(answers, images="q", skip_broken=False, flip=False)
    assert with_answer(answers, "base", "a") == answers


def test_a_draft_survives_and_a_spoilt_one_is_passed_over():
    drop_draft()
    assert load_draft() is None
    answers = Answers(images="/p", trigger="猫", vram_gib=8.0, overrides={"rank": 8})
    save_draft(answers, "base")
    draft = load_draft()
    assert (draft.answers, draft.topic) == (answers, "base")
    path = state_dir() / "draft.json"
    assert path.stat().st_mode & 0o777 == 0o600
    content = json.loads(path.read_text())
    content["answers"] |= {"of a later version": 1, "look": 7}
    path.write_text(json.dumps(content))
    assert load_draft().answers == answers, "unknown and mistyped answers fall away, the rest stays"
    for spoilt in ("", "[1, 2]", "{}", '{"answers": 3, "topic": "x", "saved": 1}', "\x00"):
        path.write_text(spoilt)
        assert load_draft() is None, spoilt
    drop_draft()


def test_the_equivalent_command_gives_the_same_answers():
    from crumb.wizard.cli import build_parser

    answers = Answers(
        images="/my pictures", subject="style", base="/b.safetensors", vae="/v.safetensors", prediction="epsilon",
        gpu="RTX 3060", vram_gib=8.0, look="anime", trigger="it's", class_word="cat", name="n", flip=True, skip_broken=True,
        overrides={"rank": 8, "learning_rate": 2e-5, "buckets": False, "optimizer": "AdamW", "sample_prompts": ["a, b", "c"],
                   "optimizer_args": {"weight_decay": 0.02}, "epochs": 3, "masked_loss": "alpha", "regularization": "/r",
                   "subsets": [{"images": "/a, b", "repeats": 3, "flip": False}, {"images": "/c", "regularization": True}]})
    import shlex

    options = build_parser().parse_args(shlex.split(equivalent_command(answers))[1:])
    assert answers_from(options) == answers


def test_paths_are_made_absolute(tmp_path, monkeypatch):
    """A draft is taken up again from any folder."""
    monkeypatch.chdir(tmp_path)
    Path("pictures").mkdir()
    assert read_answer(BY_KEY["images"], " 'pictures' ", Answers()) == os.path.join(tmp_path, "pictures")
