"""Turns prompts into SDXL's conditioning, as the reference pipeline does.

Separate from loading, because training may run it each step (text encoders being trained) or once (cached).
"""

import torch
from torch import Tensor

from crumb.engine.model.load import TextEncoders
from crumb.engine.model.tokenizer import NUM_POSITIONS
from crumb.profiles.errors import RequestError

CHUNK = NUM_POSITIONS - 2
"""Tokens of a prompt that fit between start and end of text."""

PENULTIMATE = 2
"""The clip skip SDXL was trained with: the second-last layer of both encoders (CLIP-SKIP)."""


def encode_prompts(encoders: TextEncoders, prompts: list[str], clip_skip: int = PENULTIMATE,
                   max_token_length: int = CHUNK) -> tuple[Tensor, Tensor]:
    """encoder_hidden_states (B, 77 C, D1 + D2) and pooled (B, P), in the encoders' dtype and on their device.

    Hidden states of the layer `clip_skip` from the end of both encoders, and encoder 2's projected end-of-text state of
    the first chunk. Prompts over 75 tokens are encoded in C chunks of 75, each between start and end of text and laid
    one after the other, as ComfyUI and A1111 do; what exceeds `max_token_length` is cut off. C is that of the longest
    prompt; shorter ones get empty chunks. Gradients flow where the encoders have trainable parts.
    """
    _check_clip_skip(encoders, clip_skip)
    chunks = [split_prompt(encoders, prompt, max_token_length) for prompt in prompts]
    num_chunks = max(map(len, chunks))
    padded = [own + [[]] * (num_chunks - len(own)) for own in chunks]
    hidden = []
    for encoder, tokenizer in ((encoders.text_encoder, encoders.tokenizer), (encoders.text_encoder_2, encoders.tokenizer_2)):
        ids = torch.tensor([[_framed(tokenizer, chunk) for chunk in own] for own in padded], device=encoder.device)
        output = encoder(ids.flatten(0, 1), output_hidden_states=True)
        # (B C, 77, D) -> (B, C 77, D)
        hidden.append(output.hidden_states[-clip_skip].unflatten(0, ids.shape[:2]).flatten(1, 2))
    pooled = output.text_embeds.unflatten(0, ids.shape[:2])[:, 0]
    return torch.cat(hidden, dim=-1), pooled


def split_prompt(encoders: TextEncoders, prompt: str, max_token_length: int) -> list[list[int]]:
    """The prompt's token ids in chunks of 75, at least one chunk."""
    ids = token_ids(encoders.tokenizer, prompt)[:max_token_length]
    return [ids[start:start + CHUNK] for start in range(0, len(ids), CHUNK)] or [[]]


def token_ids(tokenizer, prompt: str) -> list[int]:
    """All of the prompt's tokens, without start and end of text."""
    return tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids


def pad_chunks(hidden: list[Tensor], empty: Tensor) -> Tensor:
    """Prompts of (77 C, D) each as one batch (B, 77 max C, D), filled with the empty prompt's (77, D)."""
    longest = max(map(len, hidden))
    return torch.stack([torch.cat([one, *[empty] * ((longest - len(one)) // len(empty))]) for one in hidden])


def _framed(tokenizer, chunk: list[int]) -> list[int]:
    framed = [tokenizer.bos_token_id, *chunk, tokenizer.eos_token_id]
    return framed + [tokenizer.pad_token_id] * (NUM_POSITIONS - len(framed))


def _check_clip_skip(encoders: TextEncoders, clip_skip: int) -> None:
    num_layers = min(encoder.config.num_hidden_layers for encoder in (encoders.text_encoder, encoders.text_encoder_2))
    if clip_skip > num_layers:
        raise RequestError(f"clip_skip is {clip_skip} but this base's text encoders have {num_layers} layers. SDXL's own is "
                           f"{PENULTIMATE}.")
