"""What a picture's caption becomes before it is encoded: order shuffled, tags left out, words set around it.

A tag is what stands between two commas. Pure functions of seeds, so that a resumed run sees the same captions.
"""

import random
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class CaptionRules:
    """How captions vary. Neither moved nor left out: `keep_tokens` tags at the front, and those that hold the trigger word."""

    shuffle: bool = False
    keep_tokens: int = 0
    tag_dropout: float = 0.0
    caption_dropout: float = 0.0
    prefix: str = ""
    suffix: str = ""
    trigger: str = ""

    @property
    def vary(self) -> bool:
        """Whether one caption can become several texts."""
        return self.shuffle or self.tag_dropout > 0


def holds_word(caption: str, word: str) -> bool:
    """Whether it stands in the caption as a word of its own, in either case."""
    return bool(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", caption, re.IGNORECASE))


def plain_caption(caption: str, rules: CaptionRules) -> str:
    """The caption in its own order, whole; prefix and suffix are always around it."""
    return " ".join(part for part in (rules.prefix, caption, rules.suffix) if part)


def caption_variant(caption: str, rules: CaptionRules, number: int, seed: int) -> str:
    """One of the texts that the caption can become; the same for the same number and seed."""
    if not rules.vary:
        return plain_caption(caption, rules)
    # A string seed is hashed with SHA-512: the same on every machine and in every Python.
    generator = random.Random(f"crumb caption {seed} {number} {caption}")
    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    kept, loose = tags[:rules.keep_tokens], tags[rules.keep_tokens:]
    if rules.trigger:
        kept += [tag for tag in loose if holds_word(tag, rules.trigger)]
        loose = [tag for tag in loose if not holds_word(tag, rules.trigger)]
    if rules.shuffle:
        generator.shuffle(loose)
    loose = [tag for tag in loose if generator.random() >= rules.tag_dropout]
    return plain_caption(", ".join(kept + loose), rules)


def caption_for_view(caption: str, rules: CaptionRules, num_variants: int, seed: int, view: str) -> str:
    """The text of one showing, told by `view`: one of the first `num_variants`, or none at all by caption_dropout."""
    generator = random.Random(f"crumb caption view {seed} {view}")
    if generator.random() < rules.caption_dropout:
        return ""
    return caption_variant(caption, rules, generator.randrange(num_variants), seed)
