"""An epoch's views, counted here one by one."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crumb.profiles.buckets import assign
from crumb.profiles.epoch import bucket_findings, hold_out, plan_epoch
from crumb.profiles.errors import RequestError
from crumb.profiles.pictures import Picture
from crumb.profiles.subsets import Subset

OWN = Subset(images="own", repeats=2, trigger="t", class_word="c", flip=False, masked_loss="off")
MORE = replace(OWN, images="more", repeats=3)
REG = replace(OWN, images="reg", repeats=1, regularization=True)
SUBSETS = [OWN, MORE, REG]
SQUARE, WIDE, TALL = (1024, 1024), (1280, 768), (768, 1280)


def picture(name, size=SQUARE, subset=0, repeats=1):
    return Picture(Path(f"{name}.png"), *size, repeats, None, None, (), subset)


def epoch_of(pictures, held_out=()):
    return plan_epoch(pictures, SUBSETS, [assign(p.width, p.height, 1024) for p in pictures], held_out)


def test_training_views_by_hand():
    epoch = epoch_of([picture("a"), picture("b", WIDE), picture("c", SQUARE, 1), picture("d", SQUARE, 1, repeats=2)])
    assert epoch.trained == {SQUARE: [0, 0, 2, 2, 2, 3, 3, 3, 3, 3, 3], WIDE: [1, 1]}
    assert epoch.regularization == {} and epoch.buckets(5) == epoch.trained
    assert epoch_of([picture("a"), picture("b")], held_out=[0]).trained == {SQUARE: [1, 1]}
    assert epoch.num_batches(4) == 3 + 1


@given(st.lists(st.tuples(st.sampled_from([SQUARE, WIDE, TALL]), st.integers(0, 2), st.integers(1, 3)), max_size=30))
def test_as_many_regularization_views_as_training_views_and_all_take_turns(drawn):
    pictures = [picture("first"), *(picture(str(n), *one) for n, one in enumerate(drawn))]
    epoch = epoch_of(pictures)
    regs = {index for index, one in enumerate(pictures) if one.subset == 2}
    assert epoch.num_regularization == (epoch.num_trained if regs else 0)
    sizes = [{size: len(views) for size, views in epoch.buckets(number).items()} for number in range(4)]
    assert sizes.count(sizes[0]) == 4, "an epoch's batches must not change in number, or a step would not tell its epoch"
    assert sizes[0] == epoch.counts() and sum(sizes[0].values()) == epoch.num_trained + epoch.num_regularization
    for size, rotation in epoch.regularization.items():
        assert all(pictures[index].width == size[0] for index in rotation.views)
        if rotation.num_views:
            # After as many epochs as there are views, each has been shown equally often.
            shown = Counter(index for number in range(len(rotation.views)) for index in rotation.of_epoch(number))
            repeats = Counter(rotation.views)
            assert {shown[index] / repeats[index] for index in repeats} == {rotation.num_views}


def test_shares_of_buckets_by_hand():
    """Six training views; ten regularization pictures, 8 square and 2 wide: 8/10 of 6 is 4.8, rounded down, and the rest."""
    pictures = [picture(str(n)) for n in range(3)] + [picture(f"r{n}", SQUARE if n < 8 else WIDE, 2) for n in range(10)]
    epoch = epoch_of(pictures)
    assert {size: rotation.num_views for size, rotation in epoch.regularization.items()} == {SQUARE: 4, WIDE: 2}
    assert [epoch.regularization[SQUARE].of_epoch(number) for number in range(3)] == [
        [3, 4, 5, 6], [7, 8, 9, 10], [3, 4, 5, 6]]
    few = epoch_of([picture("a"), picture("r", SQUARE, 2)])
    assert few.buckets(0) == {SQUARE: [0, 0, 1, 1]}, "one picture is shown as often as the training pictures"


def test_only_training_pictures_are_held_out():
    pictures = [picture(str(n), subset=2 if n % 2 else 0) for n in range(20)]
    for seed in range(20):
        held_out = hold_out(pictures, SUBSETS, 5, seed)
        assert len(set(held_out)) == 5 and all(index % 2 == 0 for index in held_out)
    with pytest.raises(RequestError, match="10 of 10 pictures"):
        hold_out(pictures, SUBSETS, 10, 1)


def test_findings_are_few_and_short():
    mixed = [picture("a"), picture("b"), picture("tall", TALL), picture("wide", WIDE, 1)]
    single, short = bucket_findings(mixed, epoch_of(mixed), 4)
    assert "2 buckets have a single picture (768x1280: tall.png, 1280x768: wide.png)" in single
    assert "2 buckets have a last batch that is not full (768x1280: 2 of 4, 1280x768: 3 of 4)" in short
    assert bucket_findings(mixed[:2], epoch_of(mixed[:2]), 4) == []
    assert len(bucket_findings(mixed, epoch_of(mixed), 1)) == 1, "with batches of one, every batch is full"

    many = [picture(str(n), (1024 + 64 * n, 1024 * 1024 // (1024 + 64 * n))) for n in range(9)]
    for finding in bucket_findings(many, epoch_of(many), 4):
        assert "more)" in finding and len(finding) < 200, finding


def test_regularization_pictures_that_get_no_turn_are_told():
    pictures = [picture("a"), picture("odd", WIDE, 2), *(picture(f"r{n}", SQUARE, 2) for n in range(30))]
    (told,) = bucket_findings(pictures, epoch_of(pictures), 1)
    assert "no turn: 1 (first: odd.png)" in told
