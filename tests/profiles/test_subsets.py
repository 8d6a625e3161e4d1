"""Subsets: what they inherit, what they may say themselves, and every mistake named as the plan's own are."""

import pytest

from crumb.profiles.errors import RequestError
from crumb.profiles.plan import check_value, dump_plan, parse_plan, plan_fields, with_absolute_paths
from crumb.profiles.subsets import INHERITED, Subset, effective_subsets, subset_as_text, subset_from_text

PLAN = {"repeats": 4, "trigger": "ohwx", "class_word": "cat", "flip": True, "masked_loss": "alpha",
        "shuffle_captions": True, "keep_tokens": 2, "tag_dropout": 0.1, "caption_dropout": 0.2, "caption_prefix": "p",
        "caption_suffix": "s"}
OTHER = {"repeats": 7, "trigger": "zwx", "class_word": "dog", "flip": False, "masked_loss": "files",
         "shuffle_captions": False, "keep_tokens": 0, "tag_dropout": 0.3, "caption_dropout": 0.4, "caption_prefix": "q",
         "caption_suffix": "t"}


def test_a_subset_has_the_plans_values_where_it_says_nothing(make_plan):
    own, plain = effective_subsets(make_plan(**PLAN, subsets=[{"images": "more"}]))
    assert own == Subset(images="pictures", **PLAN) and plain == Subset(images="more", **PLAN)
    assert (own.regularization, own.loss_weight) == (False, 1.0)


@pytest.mark.parametrize("name", INHERITED)
def test_each_setting_of_its_own_wins(make_plan, name):
    _, subset = effective_subsets(make_plan(**PLAN, subsets=[{"images": "more", name: OTHER[name]}]))
    assert subset == Subset(images="more", **PLAN | {name: OTHER[name]})


def test_regularization_folders(make_plan):
    """No trigger, no mask, no repeats of the plan, the prior's weight; unless the subset says otherwise."""
    tables = [{"images": "a", "regularization": True}, {"images": "b", "loss_weight": 0.5},
              {"images": "c", "regularization": True, "loss_weight": 2.0, "repeats": 3, "masked_loss": "files", "flip": False}]
    plan = make_plan(**PLAN, regularization="reg", prior_loss_weight=0.25, subsets=tables)
    _, a, b, c, reg = effective_subsets(plan)
    neutral = PLAN | {"repeats": 1, "trigger": "", "masked_loss": "off"}
    assert a == Subset(images="a", regularization=True, loss_weight=0.25, **neutral)
    assert b == Subset(images="b", loss_weight=0.5, **PLAN)
    assert c == Subset(images="c", regularization=True, loss_weight=2.0,
                       **neutral | {"repeats": 3, "masked_loss": "files", "flip": False})
    assert reg == Subset(images="reg", regularization=True, loss_weight=0.25, **neutral)


@pytest.mark.parametrize(("table", "words"), [
    ({"images": "a", "repaets": 2}, "table 2: unknown key 'repaets'.*Did you mean 'repeats'"),
    ({"repeats": 2}, "table 2: images is missing"),
    ({"images": "a", "repeats": "2"}, "table 2: repeats is '2'; it must be a whole number"),
    ({"images": "a", "repeats": 0}, "between 1 and 10000"),
    ({"images": "a", "flip": 1}, "true or false"),
    ({"images": "a", "masked_loss": "alhpa"}, "one of off, alpha, files.*Did you mean 'alpha'"),
    ({"images": "a", "loss_weight": -1}, "loss_weight is -1.0; it must be between"),
    ({"images": "a", "regularization": True, "trigger": "x"}, "trigger is 'x'"),
    ("a", "subsets is .*a list of tables"),
])
def test_mistakes_are_named_with_their_table(make_plan, table, words):
    with pytest.raises(RequestError, match=words):
        make_plan(subsets=[{"images": "fine"}, table])


def test_both_ways_of_writing_them_are_read_alike(make_plan, tmp_path):
    tables = [{"images": "a, b", "repeats": 3}, {"images": "/c", "regularization": True, "class_word": 'a "cat"'}]
    written = dump_plan(make_plan(subsets=tables), {"subsets": "so it was asked"})
    inline = written[written.index("subsets = ["):written.index("\n]") + 2]
    assert inline.count("\n") == len(tables) + 1, "a table a line"
    assert parse_plan(written).subsets == tables
    headed = ('[[data.subsets]]\nimages = "a, b" # here\nrepeats = 3\n\n'
              '[[data.subsets]]\nimages = "/c"\nregularization = true\nclass_word = "a \\"cat\\""\n')
    by_header = written.replace(inline, headed)
    assert parse_plan(by_header).subsets == tables
    for text in (written, by_header):
        moved = parse_plan(with_absolute_paths(text.replace('regularization = ""', 'regularization = "reg"'), tmp_path))
        assert [table["images"] for table in moved.subsets] == [str(tmp_path / "a, b"), "/c"]
        assert moved.regularization == str(tmp_path / "reg")
    assert "subsets = []" in dump_plan(make_plan())


def test_on_the_command_line():
    fields = plan_fields()
    table = {"images": "/a, b", "repeats": 3, "flip": True, "loss_weight": 0.5, "trigger": "7"}
    text = "images=/a, b,repeats=3,flip=true, loss_weight=0.5,trigger=7"
    assert subset_from_text(text, fields) == table == subset_from_text(subset_as_text(table), fields)
    assert check_value("subsets", '[{images = "x", repeats = 2}]') == [{"images": "x", "repeats": 2}]
    for wrong, words in [("/pictures", "there is no '='"), ("images=/a,flp=true", "Did you mean 'flip'"),
                         ("images=/a,flip=maybe", "true or false"), ("repeats=2", "images is missing")]:
        with pytest.raises(RequestError, match=words):
            subset_from_text(wrong, fields)
