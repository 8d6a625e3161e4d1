"""Conditioning while the text encoders learn: they stay in memory, and every text is encoded anew."""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from crumb.engine.data.prepare import Batch
from crumb.engine.model.load import TextEncoders
from crumb.engine.model.text import encode_prompts
from crumb.profiles.plan import Plan


def encode_batch(batch: Batch, encoders: TextEncoders, plan: Plan, learns: bool) -> Batch:
    """The batch with its prompts encoded; gradients flow back into the encoders where they learn."""
    with torch.set_grad_enabled(learns):
        hidden, pooled = encode_prompts(encoders, list(batch.prompts), plan.clip_skip, plan.max_token_length)
    return replace(batch, encoder_hidden_states=hidden, pooled=pooled)


def text_learns(plan: Plan, step: int) -> bool:
    """Whether the text encoders still learn at this step (0-based)."""
    return step < plan.num_text_steps


@torch.no_grad()
def encode_texts(texts: Iterable[str], encoders: TextEncoders, plan: Plan) -> dict[str, dict[str, Tensor]]:
    """Entries as the prompt cache holds them, by text."""
    entries = {}
    for text in dict.fromkeys(texts):
        hidden, pooled = encode_prompts(encoders, [text], plan.clip_skip, plan.max_token_length)
        entries[text] = {"encoder_hidden_states": hidden[0], "pooled": pooled[0]}
    return entries
