"""Trains the demo base's U-Net and its two text encoders together on the encoded pictures and their names.

Resumable: `denoiser.pt` holds the whole state. eps-prediction on SDXL's noise schedule, min-SNR weights, an
exponential average of the weights as the result.
"""

import math
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from pictures import caption, load_base_set, load_set
from progress import Log, save_state
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from crumb.engine.model.config import BOS_TOKEN_ID, EOS_TOKEN_ID, NUM_TIME_IDS, make_text_encoder_config, make_unet_config
from crumb.engine.model.load import load_text_encoders, load_unet
from crumb.engine.model.tokenizer import NUM_POSITIONS, make_tokenizers
from crumb.engine.train.noise import add_noise, alphas_cumprod
from crumb.profiles.base_model import inspect_base_model

WIDTHS, DEPTHS = (64, 64, 128), (0, 1, 1)
TEXT_WIDTH, TEXT_LAYERS, PROJECTION_DIM, TIME_EMBED_DIM = 64, 3, 64, 32
VOCAB_SIZE = 49408
# Words that no caption has share this many rows by their token's number.
NUM_HASHED_ROWS = 64
BATCH, LEARNING_RATE, WARMUP_STEPS = 32, 1e-3, 200
MIN_SNR_GAMMA = 5.0
CAPTION_DROPOUT = 0.1
# How often one to three words from the hashed rows stand in front, as a trigger word will.
STRANGE_WORDS = 0.15
EMA_DECAY = 0.999


class HashedEmbedding(nn.Module):
    """A token embedding of few rows: one for each token that captions use, NUM_HASHED_ROWS for all the others."""

    def __init__(self, used_tokens: list[int]):
        super().__init__()
        rows = len(used_tokens) + torch.arange(VOCAB_SIZE) % NUM_HASHED_ROWS
        rows[torch.tensor(used_tokens)] = torch.arange(len(used_tokens))
        self.register_buffer("rows", rows, persistent=False)
        self.weight = nn.Parameter(torch.randn(len(used_tokens) + NUM_HASHED_ROWS, TEXT_WIDTH) * 0.02)

    def forward(self, token_ids: Tensor) -> Tensor:
        return F.embedding(self.rows[token_ids], self.weight)


class DemoBase(nn.Module):
    """U-Net and text encoders, as SDXL joins them."""

    def __init__(self, used_tokens: list[int]):
        super().__init__()
        added_dim = PROJECTION_DIM + NUM_TIME_IDS * TIME_EMBED_DIM
        self.unet = UNet2DConditionModel(
            **make_unet_config(WIDTHS, DEPTHS, 2 * TEXT_WIDTH, PROJECTION_DIM, added_dim, 16)
        ).to(memory_format=torch.channels_last)
        shared = (TEXT_WIDTH, 4 * TEXT_WIDTH, TEXT_LAYERS, PROJECTION_DIM)
        self.first = CLIPTextModel(CLIPTextConfig(**make_text_encoder_config(*shared, "quick_gelu")))
        self.second = CLIPTextModelWithProjection(CLIPTextConfig(**make_text_encoder_config(*shared, "gelu")))
        for encoder in (self.first, self.second):
            encoder.set_input_embeddings(HashedEmbedding(used_tokens))

    def conditioning(self, ids: Tensor, ids_2: Tensor) -> tuple[Tensor, Tensor]:
        first = self.first(ids, output_hidden_states=True)
        second = self.second(ids_2, output_hidden_states=True)
        return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), second.text_embeds


def tokenize(captions: list[str]) -> tuple[Tensor, Tensor]:
    """(N, 77) token ids of both tokenizers."""
    both = [
        tokenizer(captions, padding="max_length", max_length=NUM_POSITIONS, truncation=True, return_tensors="pt").input_ids
        for tokenizer in make_tokenizers()
    ]
    return both[0], both[1]


def used_tokens(folder: Path) -> list[int]:
    """Tokens of the captions of every set, with the few that every prompt has."""
    captions = sorted({caption(key) for name in ("noto", "fluent", "ink") for key in load_set(folder, name)[0]})
    found = set(tokenize(captions)[0].flatten().tolist()) | set(tokenize([", a the of and"])[0].flatten().tolist())
    return sorted(found | {0, BOS_TOKEN_ID, EOS_TOKEN_ID})


def load_weights(model: DemoBase, base_file: Path) -> None:
    """Fills the model from an SDXL file of the same shapes, such as the base that this recipe made before."""
    base = inspect_base_model(base_file)
    encoders = load_text_encoders(base, torch.float32)
    model.unet.load_state_dict(load_unet(base, torch.float32).state_dict())
    for mine, theirs in ((model.first, encoders.text_encoder), (model.second, encoders.text_encoder_2)):
        state = theirs.state_dict()
        name = next(name for name in state if name.endswith("token_embedding.weight"))
        embedding = mine.get_input_embeddings()
        rows = torch.empty_like(embedding.weight)
        rows[embedding.rows] = state[name]
        mine.load_state_dict(state | {name: rows})


def train_denoiser(folder: Path, num_steps: int, start: Path | None = None, seed: int = 0, save_every: int = 500) -> None:
    """Trains up to `num_steps`, from the last kept state if there is one, else from the weights of `start`."""
    torch.manual_seed(seed)
    latents = torch.from_numpy(np.load(folder / "latents.npy"))
    tokens = tokenize([caption(key) for key in load_base_set(folder)[0]] + [""])
    model = DemoBase(used_tokens(folder))
    if start:
        load_weights(model, start)
    average = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    state_path, step = folder / "denoiser.pt", 0
    if state_path.exists():
        state = torch.load(state_path)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average, step = [value.detach() for value in state["average"]], state["step"]
    alphas = alphas_cumprod(zero_terminal_snr=False)
    log = Log(folder / "denoiser.jsonl", "loss", 100)
    while step < num_steps:
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * learning_rate_factor(step, num_steps)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        loss = _loss(model, latents, tokens, alphas, generator)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(average, list(model.parameters()), 1 - min(EMA_DECAY, (1 + step) / (10 + step)))
        step += 1
        log.add(step, loss.item())
        if step % save_every == 0 or step == num_steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "average": average, "step": step}
            save_state(state_path, state)


def averaged(folder: Path) -> DemoBase:
    """The trained model with its averaged weights."""
    model = DemoBase(used_tokens(folder))
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), torch.load(folder / "denoiser.pt")["average"]):
            parameter.copy_(value)
    return model.eval()


def learning_rate_factor(step: int, num_steps: int) -> float:
    """Warm-up, then a cosine down to nothing."""
    return min(1, (step + 1) / WARMUP_STEPS) * max(0.01, 0.5 * (1 + math.cos(math.pi * step / num_steps)))


def _loss(model: DemoBase, latents: Tensor, tokens: tuple[Tensor, Tensor], alphas: Tensor, generator) -> Tensor:
    chosen = torch.randint(len(latents), (BATCH,), generator=generator)
    clean = latents[chosen]
    noise = torch.randn(clean.shape, generator=generator)
    timesteps = torch.randint(len(alphas), (BATCH,), generator=generator)
    noisy = add_noise(clean, noise, timesteps, alphas).contiguous(memory_format=torch.channels_last)
    empty = torch.rand(BATCH, generator=generator) < CAPTION_DROPOUT
    captions = torch.where(empty, len(latents), chosen)
    ids, ids_2 = _with_strange_words(tokens[0][captions], tokens[1][captions], generator)
    # Without AMX, bf16 takes three times as long as fp32.
    with torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_amx_tile_supported()):
        hidden, pooled = model.conditioning(ids, ids_2)
        added = {"text_embeds": pooled, "time_ids": torch.tensor([[128.0, 128.0, 0.0, 0.0, 128.0, 128.0]]).expand(BATCH, -1)}
        predicted = model.unet(noisy, timesteps, encoder_hidden_states=hidden, added_cond_kwargs=added, return_dict=False)[0]
    snr = alphas[timesteps] / (1 - alphas[timesteps])
    weights = snr.clamp(max=MIN_SNR_GAMMA) / snr
    return ((predicted.float() - noise).square().mean(dim=(1, 2, 3)) * weights).mean()


def _with_strange_words(ids: Tensor, ids_2: Tensor, generator) -> tuple[Tensor, Tensor]:
    """Puts the same one to three random tokens in front of some captions, for both encoders."""
    ids, ids_2 = ids.clone(), ids_2.clone()
    for i in (torch.rand(len(ids), generator=generator) < STRANGE_WORDS).nonzero().flatten().tolist():
        words = torch.randint(1000, 49000, (int(torch.randint(1, 4, (), generator=generator)),), generator=generator)
        for row in (ids[i], ids_2[i]):
            row[1:] = torch.cat([words, row[1 : NUM_POSITIONS - len(words)]])
    return ids, ids_2


if __name__ == "__main__":
    import sys

    train_denoiser(Path(sys.argv[1]), int(sys.argv[2]))
