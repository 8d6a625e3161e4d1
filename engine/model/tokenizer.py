"""The CLIP tokenizers of SDXL, offline, from the vocabulary that ships with the package.

`bpe_simple_vocab_16e6.txt.gz` is OpenAI CLIP's (MIT), as open_clip distributes it. No base model is needed, since
single-file checkpoints carry no vocabulary.
"""

import gzip
from pathlib import Path

from transformers import CLIPTokenizer

VOCAB_FILE = Path(__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
NUM_MERGES = 48894
NUM_POSITIONS = 77


def make_tokenizers() -> tuple[CLIPTokenizer, CLIPTokenizer]:
    """The tokenizers of text encoder 1, which pads with 49407, and of text encoder 2, which pads with 0."""
    vocab, merges = _read_vocab()
    first = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=NUM_POSITIONS)
    second = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=NUM_POSITIONS)
    # Given as `pad_token="!"` it would become a special token, and every "!" of a caption would read as padding.
    second.pad_token_id = 0
    return first, second


def _read_vocab() -> tuple[dict[str, int], list[tuple[str, str]]]:
    lines = gzip.decompress(VOCAB_FILE.read_bytes()).decode("utf-8").split("\n")
    merges = [tuple(line.split()) for line in lines[1 : 1 + NUM_MERGES]]
    letters = _byte_letters()
    words = letters + [f"{letter}</w>" for letter in letters] + ["".join(merge) for merge in merges]
    words += ["<|startoftext|>", "<|endoftext|>"]
    return {word: index for index, word in enumerate(words)}, merges


def _byte_letters() -> list[str]:
    """A printable letter for each byte: itself, else one from U+0100 on (openai/CLIP: clip/simple_tokenizer.py)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + number) for number in range(256 - len(printable))]
