"""What a picture's caption becomes before it is encoded: order shuffled, tags left out, words set around it.

A tag is what stands between two commas. The settings are those of the picture's subset; neither moved nor left out are
`keep_tokens` tags at the front, and those that hold the trigger word. Pure functions of seeds, so that a resumed run sees
the same captions.
"""

import random
import re

from crumb.profiles.subsets import Subset


def holds_word(caption: str, word: str) -> bool:
    """Whether it stands in the caption as a word of its own, in either case."""
    return bool(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", caption, re.IGNORECASE))


def plain_caption(caption: str, subset: Subset) -> str:
    """The caption in its own order, whole; prefix and suffix are always around it."""
    return " ".join(part for part in (subset.caption_prefix, caption, subset.caption_suffix) if part)


def caption_variant(caption: str, subset: Subset, number: int, seed: int) -> str:
    """One of the texts that the caption can become; the same for the same number and seed."""
    if not subset.captions_vary:
        return plain_caption(caption, subset)
    # A string seed is hashed with SHA-512: the same on every machine and in every Python.
    generator = random.Random(f"crumb caption {seed} {number} {caption}")
    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    kept, loose = tags[:subset.keep_tokens], tags[subset.keep_tokens:]
    if subset.trigger:
        kept += [tag for tag in loose if holds_word(tag, subset.trigger)]
        loose = [tag for tag in loose if not holds_word(tag, subset.trigger)]
    if subset.shuffle_captions:
        generator.shuffle(loose)
    loose = [tag for tag in loose if generator.random() >= subset.tag_dropout]
    return plain_caption(", ".join(kept + loose), subset)


def caption_for_view(caption: str, subset: Subset, num_variants: int, seed: int, view: str) -> str:
    """The text of one showing, told by `view`: one of the first `num_variants`, or none at all by caption_dropout."""
    generator = random.Random(f"crumb caption view {seed} {view}")
    if generator.random() < subset.caption_dropout:
        return ""
    return caption_variant(caption, subset, generator.randrange(num_variants), seed)
