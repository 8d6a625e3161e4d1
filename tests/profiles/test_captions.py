"""Caption variants by counting: what is kept, moved, left out, and how often."""

from collections import Counter

import pytest

from crumb.profiles.captions import caption_for_view, caption_variant, plain_caption
from crumb.profiles.subsets import Subset

TAGS = [f"tag{n}" for n in range(8)]
CAPTION = ", ".join(TAGS)


def settings(**given) -> Subset:
    plain = {"images": "p", "repeats": 1, "trigger": "", "class_word": "", "flip": False, "masked_loss": "off"}
    return Subset(**plain | {"keep_tokens": 0} | given)


def variants(rules, count=2000):
    return [caption_variant(CAPTION, rules, number, seed=1) for number in range(count)]


def test_shuffling_moves_all_but_the_kept_and_loses_none():
    texts = [text.split(", ") for text in variants(settings(shuffle_captions=True, keep_tokens=2))]
    assert all(tags[:2] == TAGS[:2] and sorted(tags) == TAGS for tags in texts)
    places = Counter(tags.index("tag5") for tags in texts)
    assert set(places) == set(range(2, 8)) and max(places.values()) < 1.3 * min(places.values())


def test_tag_dropout_leaves_out_its_share_of_all_but_the_kept():
    texts = [text.split(", ") for text in variants(settings(tag_dropout=0.3, keep_tokens=1))]
    counts = Counter(tag for tags in texts for tag in tags)
    assert counts["tag0"] == 2000 and all(counts[tag] == pytest.approx(1400, abs=80) for tag in TAGS[1:])
    assert all(tags == sorted(tags) for tags in texts), "not shuffled unless asked"


def test_caption_dropout_empties_its_share_and_views_choose_among_the_variants():
    rules = settings(shuffle_captions=True, caption_dropout=0.25, caption_prefix="a photo of", caption_suffix="by day")
    texts = [caption_for_view(CAPTION, rules, 5, 1, f"{step} 0") for step in range(2000)]
    assert texts.count("") == pytest.approx(500, abs=60)
    cached = {caption_variant(CAPTION, rules, number, 1) for number in range(5)}
    assert set(texts) - {""} == cached, "every view is one that can be cached, and all are used"
    assert all(text.startswith("a photo of ") and text.endswith(" by day") for text in cached)


def test_the_same_seed_repeats_and_another_differs():
    rules = settings(shuffle_captions=True)
    assert variants(rules, 20) == variants(rules, 20)
    assert variants(rules, 20) != [caption_variant(CAPTION, rules, number, seed=2) for number in range(20)]
    assert caption_variant("a whole sentence", rules, 3, 1) == "a whole sentence"


@pytest.mark.parametrize(("rules", "text"), [
    (settings(), "b, a"), (settings(caption_prefix="p,"), "p, b, a"), (settings(caption_suffix=", s"), "b, a , s"),
    (settings(caption_prefix="x", caption_dropout=0.9), "x b, a")])
def test_plain_captions(rules, text):
    assert plain_caption("b, a", rules) == text == caption_variant("b, a", rules, 7, 1)


def test_the_trigger_word_is_kept_wherever_it_stands():
    rules = settings(shuffle_captions=True, tag_dropout=0.5, trigger="ohwx")
    texts = [caption_variant("1girl, blue sky, ohwx woman, ohwxy", rules, number, seed=1) for number in range(200)]
    assert all(text.split(", ")[0] == "ohwx woman" for text in texts)
    assert any("ohwxy" not in text for text in texts) and any("ohwxy" in text for text in texts)
