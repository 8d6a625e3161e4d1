"""Turns prompts into SDXL's conditioning, as the reference pipeline does.

Separate from loading, because training may run it each step (text encoders being trained) or once (cached).
"""

import torch

from crumb.engine.model.load import TextEncoders
from crumb.engine.model.tokenizer import NUM_POSITIONS


def encode_prompts(encoders: TextEncoders, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """encoder_hidden_states (B, 77, D1 + D2) and pooled (B, P), in the encoders' dtype and on their device.

    The second-to-last hidden states of both encoders, and encoder 2's projected end-of-text state. Longer prompts
    are cut at 77 tokens. Gradients flow where the encoders have trainable parts.
    """
    first = encoders.text_encoder(
        _token_ids(encoders.tokenizer, prompts, encoders.text_encoder.device), output_hidden_states=True
    )
    second = encoders.text_encoder_2(
        _token_ids(encoders.tokenizer_2, prompts, encoders.text_encoder_2.device), output_hidden_states=True
    )
    return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), second.text_embeds


def _token_ids(tokenizer, prompts: list[str], device: torch.device) -> torch.Tensor:
    tokens = tokenizer(prompts, padding="max_length", max_length=NUM_POSITIONS, truncation=True, return_tensors="pt")
    return tokens.input_ids.to(device)
