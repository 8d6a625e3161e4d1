"""sd-scripts' options at the end of a prompt: each is read, and each mistake is named before a run starts."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from crumb.profiles.answers import Answers
from crumb.profiles.dataset import Picture
from crumb.profiles.errors import RequestError
from crumb.profiles.interview import default_prompts
from crumb.profiles.plan import dump_plan, parse_plan
from crumb.profiles.sample_prompts import (
    SamplePrompt,
    parse_sample_prompts,
    sample_prompts,
    texts_of,
    with_steps,
    without_options,
)


def test_every_option_is_read_and_the_plan_fills_the_rest(make_plan):
    plan = make_plan(sample_prompts=["a red apple --n blurry, lowres --d 7 --w 832 --h 1216 --l 5.5 --s 24", "plain",
                                     "tall --H 192 --N", "two-tone -- or so--called"],
                     sample_negative="ugly", seed=40, resolution=128, sample_guidance=3.0, sample_steps=9)
    assert sample_prompts(plan) == [
        SamplePrompt("a red apple", "blurry, lowres", 7, 832, 1216, 5.5, 24),
        SamplePrompt("plain", "ugly", 41, 128, 128, 3.0, 9),
        SamplePrompt("tall", "", 42, 128, 192, 3.0, 9),
        SamplePrompt("two-tone -- or so--called", "ugly", 43, 128, 128, 3.0, 9),
    ]
    assert set(texts_of(sample_prompts(plan))) >= {"a red apple", "blurry, lowres", "plain", "ugly", "tall", ""}
    assert parse_sample_prompts(["other"], plan)[0].seed == 40
    assert parse_plan(dump_plan(plan)) == plan


@pytest.mark.parametrize(("options", "named"), [
    ("--w 830", ["--w (width) is 830", "multiple of 64 from 64 to 2048", "Use --w 832"]),
    ("--h 4096", ["--h (height) is 4096", "64 to 2048", "Use --h 2048"]),
    ("--h 0", ["--h (height) is 0", "Use --h 64"]),
    ("--l 0.5", ["--l (guidance) is 0.5", "a number from 1 to 30", "Use --l 1"]),
    ("--l nan", ["--l (guidance) is nan", "Use --l 1"]),
    ("--s 201", ["--s (steps) is 201", "a whole number from 1 to 200", "Use --s 200"]),
    ("--s many", ["--s (steps) is many", "such as --s 24"]),
    ("--d", ["--d (seed) is empty", "such as --d 42"]),
    ("--d -1", ["--d (seed) is -1", "0 to 2147483647", "Use --d 0"]),
    ("--ss euler", ["no option --ss", "--n negative", "put a blank after --"]),
    ("--d 1 --d 2", ["--d twice"]),
])
def test_mistakes_are_named_when_the_plan_is_checked(make_plan, options, named):
    with pytest.raises(RequestError) as caught:
        make_plan(sample_prompts=["a fine one", f"a cat {options}"])
    for word in [f"'a cat {options}'", *named]:
        assert word in str(caught.value)
    with pytest.raises(RequestError):
        parse_plan(dump_plan(make_plan()).replace("sample_prompts = []", f'sample_prompts = ["a cat {options}"]'))


def test_captions_from_elsewhere_give_prompts_without_their_options():
    assert without_options("a cat, oil on canvas --ar 16:9 --v 6") == "a cat, oil on canvas"
    assert without_options("--ar 16:9") == ""
    scan = SimpleNamespace(pictures=[Picture(Path("a.png"), 64, 64, 1, "a cat, oil on canvas --ar 16:9", None)])
    answers = Answers(images="p", base="b", subject="style", trigger="ohwx")
    assert default_prompts(answers, scan)[-1] == "ohwx, a cat, oil on canvas"


@pytest.mark.parametrize(("line", "with_7"), [
    ("a cat", "a cat --s 7"), ("a cat --s 30", "a cat --s 7"), ("--s 3 --n dogs", "--n dogs --s 7"),
    ("a cat --S 30  --n a -- dog --d 3", "a cat --n a -- dog --d 3 --s 7"),
    ("so--called -- a cat --w 64", "so--called -- a cat --w 64 --s 7")])
def test_other_steps_leave_all_else_of_a_line(line, with_7):
    assert with_steps(line, 7) == with_7
