"""The verdict on made-up runs whose outcome a person would call at a glance."""

import pytest

from crumb.profiles.verdict import Judged, best_of, verdict


def run(training, held_out=None, every=100):
    held_out = held_out or [None] * len(training)
    return [Judged(step * every, *losses) for step, losses in enumerate(zip(training, held_out))]


FALLING = [0.20, 0.16, 0.14, 0.13, 0.12, 0.11, 0.10]


@pytest.mark.parametrize(("word", "history", "steps"), [
    ("", run([0.2, 0.19, 0.18]), 600),                                               # too few to say
    ("learning", run(FALLING, FALLING), 1200),
    ("learning", run(FALLING), 600),
    ("fitted", run([0.20, 0.15, 0.12, 0.110, 0.1095, 0.1093, 0.1092]), 600),
    ("fitted", run(FALLING, [0.20, 0.15, 0.12, 0.110, 0.109, 0.1095, 0.1090]), 600),
    ("overfitting", run(FALLING, [0.20, 0.17, 0.15, 0.145, 0.15, 0.16, 0.17]), 600),
    ("overfitting", run(FALLING, [0.20, 0.201, 0.21, 0.22, 0.23, 0.24, 0.25]), 600),  # from the first step on
    ("not learning", run([0.2000, 0.1999, 0.2001, 0.1999, 0.1998, 0.1999, 0.1998]), 600),
    ("falling apart", run([0.2, 0.15, 0.3]), 600),
    ("falling apart", run([0.2, 0.15, None], [0.2, 0.16, None]), 600),
    # a few held-out pictures wander a little while the run learns
    ("fitted", run(FALLING, [0.2, 0.19985, 0.19987, 0.1999, 0.19986, 0.19985, 0.1999]), 600),
    ("", run([0.2000, 0.1999, 0.2001, 0.1999]), 1200),                               # warm-up may still be on
])
def test_word(word, history, steps):
    assert verdict(history, steps).word == word


def test_remedies_are_the_guides_and_say_what_they_rest_on():
    over = verdict(run(FALLING, [0.20, 0.17, 0.15, 0.145, 0.15, 0.16, 0.17]), 600)
    assert "step 300" in over.remedy and "regularization" in over.remedy and "0.2000 -> 0.1700" in over.basis
    assert "train longer" in verdict(run(FALLING), 600).remedy and not verdict(run(FALLING), 1200).remedy
    assert "overfitting can't be seen" in verdict(run(FALLING), 600).basis
    assert "Raise" in verdict(run([0.2] * 7), 600).remedy


def test_best_is_the_lowest_held_out_loss_after_the_start():
    assert best_of(run(FALLING, [0.20, 0.17, 0.15, 0.145, 0.15, 0.16, 0.17])).step == 300
    assert best_of(run(FALLING)) is None, "training loss falls for ever and says nothing about the best step"
    assert best_of(run(FALLING[:1], [0.1])) is None
    assert best_of(run([0.2, None, 0.1], [0.2, None, 0.15])).step == 200
    assert "No step was better" in verdict(run(FALLING, [0.20, 0.201, 0.21, 0.22, 0.23, 0.24, 0.25]), 600).remedy
    assert "lower learning rate" in verdict(run([0.2, 0.5]), 600).remedy
    assert "judge_every" in verdict(run([0.2, 0.19]), 600).basis
