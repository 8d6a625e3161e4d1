"""The plan file: what goes in comes out, and every mistake is named with its place and its mend."""

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crumb.profiles.errors import RequestError
from crumb.profiles.plan import Plan, check_value, dump_plan, load_plan, parse_plan, plan_fields, with_absolute_paths

REQUIRED = {"name": "cat", "created": "2026-01-02T03:04:05+00:00", "base_model": "/m/sdxl.safetensors", "images": "/p"}
TEXT = st.text(st.characters(min_codepoint=32, blacklist_categories=("Cs", "Cc")), max_size=40)


@given(name=TEXT, prompts=st.lists(TEXT, max_size=3), seed=st.integers(0, 2**31 - 1), rate=st.floats(1e-9, 0.1),
       arguments=st.dictionaries(st.sampled_from(["eps", "weight_decay"]), st.one_of(st.booleans(), st.floats(0, 9))))
def test_round_trip(name, prompts, seed, rate, arguments):
    plan = Plan(**REQUIRED | {"name": name, "sample_prompts": prompts, "seed": seed, "learning_rate": rate,
                              "optimizer_args": arguments})
    reasons = {"seed": name, "learning_rate": "because\u2028of # \"this\""}
    again = parse_plan(dump_plan(plan, reasons, notes=["a note", name]))
    assert dataclasses.asdict(again) == dataclasses.asdict(plan)




@pytest.mark.parametrize(("old", "new", "named"), [
    ("rank = 32", "rnak = 32", ["rnak", "rank"]),
    ("rank = 32", "rank = 0", ["rank", "0", "1 and 1024"]),
    ("rank = 32", 'rank = "many"', ["rank", "many", "whole number"]),
    ("rank = 32", "rank = true", ["rank", "whole number"]),
    ("rank = 32", "", []),
    ("[network]", "[netwrok]", ["netwrok", "network"]),
    ('optimizer = "AdamW8bit"', 'optimizer = "adamw8"', ["adamw8", "AdamW8bit"]),
    ('optimizer = "AdamW8bit"', 'optimizer = "Prodigy"', ["learning_rate", "1.0", "OPT-PRODIGY"]),
    ("learning_rate = 0.0001", "learning_rate = 1.0", ["learning_rate", "Prodigy"]),
    ("learning_rate = 0.0001", "learning_rate = nan", ["learning_rate", "nan"]),
    ("resolution = 1024", "resolution = 1000", ["1000", "multiple of 64", "1024"]),
    ("conv_rank = 0", "conv_rank = 8", ["conv_rank", "targets"]),
    ('name = "cat"', "", ["name", "missing"]),
    ('name = "cat"', 'name = "c\\u0007at"', ["control character"]),
    ("plan_version = 1", "plan_version = 7", ["plan_version", "7"]),
    ('created = "2026-01-02T03:04:05+00:00"', 'created = "yesterday"', ["created", "yesterday", "2026-"]),
    ("optimizer_args = {}", "optimizer_args = {weigth_decay = 0.1}", ["weigth_decay", "weight_decay"]),
    ("optimizer_args = {}", "optimizer_args = {betas = [0.9]}", ["betas", "two numbers"]),
    ("seed = 42", "seed = = 42", ["not valid TOML", "line"]),
    ("steps = 1000", "steps = 1000\nrank = 4", ["rank", "[network]"]),
    ("cache_latents = true", "cache_latents = false", ["cache_latents", "True"]),
])
def test_mistakes_are_named(old, new, named, tmp_path):
    good = dump_plan(Plan(**REQUIRED))
    assert old in good
    path = tmp_path / "plan.toml"
    path.write_text(good.replace(old, new))
    if not named:
        assert load_plan(path).rank == plan_fields()["rank"].default
        return
    with pytest.raises(RequestError) as caught:
        load_plan(path)
    for word in [str(path), *named]:
        assert word in str(caught.value)


def test_command_line_values_take_their_type():
    assert check_value("rank", "16") == 16
    assert check_value("alpha", "8") == 8.0
    assert check_value("buckets", "false") is False
    assert check_value("optimizer_args", "{weight_decay = 0.1}") == {"weight_decay": 0.1}
    assert check_value("sample_prompts", "a cat") == ["a cat"]
    assert check_value("name", "7") == "7"
    with pytest.raises(RequestError, match="Did you mean 'learning_rate'"):
        check_value("learning_rte", "1")


def test_relative_paths_are_taken_from_the_plans_folder(tmp_path):
    before = dump_plan(Plan(**REQUIRED | {"images": "photos", "vae": "~/vae.safetensors"}), {"images": "here"})
    after = with_absolute_paths(before, tmp_path)
    plan = parse_plan(after)
    assert (plan.images, plan.base_model) == (str(tmp_path / "photos"), "/m/sdxl.safetensors")
    assert plan.vae == str(Path.home() / "vae.safetensors") and "why: here" in after
