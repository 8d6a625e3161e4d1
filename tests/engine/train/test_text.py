"""Text encoders that learn: their own rates, when they stop, and that pictures and measurements see what they learned."""

import pytest
import torch

from crumb.engine.model.text import encode_prompts
from crumb.engine.train import loop
from crumb.engine.train.judge import judge
from crumb.profiles.sample_prompts import sample_prompts, texts_of

BOTH = {"text_encoder_learning_rate": 5e-4, "text_encoder_2_learning_rate": 2e-4, "scheduler": "constant",
        "optimizer_args": {"weight_decay": 0.0}}


def weights(run, prefix: str) -> torch.Tensor:
    return torch.cat([layer.lora_B.detach().flatten() for stem, layer in run.network.layers.items() if stem.startswith(prefix)])


def test_each_part_moves_at_its_own_rate(trainer):
    """AdamW's first step moves every value by the rate itself."""
    run = trainer(**BOTH)
    before = {prefix: weights(run, prefix) for prefix in ("lora_unet", "lora_te1", "lora_te2")}
    run.train_step(0)
    for prefix, rate in (("lora_unet", 1e-3), ("lora_te1", 5e-4), ("lora_te2", 2e-4)):
        moved = (weights(run, prefix) - before[prefix]).abs()
        assert moved.median().item() == pytest.approx(rate, rel=1e-2), prefix


def test_gradients_are_those_of_a_loss_through_the_encoders(trainer):
    """A small step of one LoRA weight changes the loss as its gradient says."""
    run = trainer(**BOTH)
    layer = next(layer for stem, layer in run.network.layers.items() if stem.startswith("lora_te2") and "q_proj" in stem)
    run._accumulate_gradients(0)
    gradient = layer.lora_B.grad.clone()
    direction, step = gradient / gradient.norm(), 0.1
    layer.lora_B.data += step * direction
    higher = run._accumulate_gradients(0)[0]
    layer.lora_B.data -= 2 * step * direction
    lower = run._accumulate_gradients(0)[0]
    assert (higher - lower) / (2 * step) == pytest.approx(gradient.norm().item(), rel=0.05)


def test_they_stop_when_the_plan_says(trainer):
    run = trainer(text_encoder_stop_after=0.2, **BOTH)
    run.train_step(0)
    run.train_step(1)
    stopped, unet = weights(run, "lora_te"), weights(run, "lora_unet")
    run.train_step(2)
    assert torch.equal(weights(run, "lora_te"), stopped) and not torch.equal(weights(run, "lora_unet"), unet)


def test_their_layers_act_whole_once_they_have_stopped(trainer, monkeypatch):
    """While they learn dropout acts in both; afterwards in the U-Net alone. The rates move next to nothing here."""
    rates = {"learning_rate": 1e-9, "text_encoder_learning_rate": 1e-9, "text_encoder_2_learning_rate": 1e-9}
    dropout = {"network_dropout": 0.3, "rank_dropout": 0.3, "module_dropout": 0.3}
    run, seen = trainer(text_encoder_stop_after=0.1, **rates, **dropout), []
    real = loop.forward_loss
    monkeypatch.setattr(loop, "forward_loss", lambda unet, batch, *rest: seen.append(batch) or real(unet, batch, *rest))
    losses = [run.train_step(step)["loss"] for step in (0, 1)]
    off = []
    for batch in seen:
        whole, pooled = (tensor.detach() for tensor in encode_prompts(run.encoders, list(batch.prompts)))
        off.append(max((batch.encoder_hidden_states - whole).abs().max().item(), (batch.pooled - pooled).abs().max().item()))
    assert off[0] > 1e-2 and off[1] < 1e-5, f"off the whole layers' by {off[0]} while they learn, {off[1]} afterwards"
    assert losses[1] != pytest.approx(trainer(**rates).train_step(1)["loss"], rel=1e-4), "the U-Net's must go on"


def test_every_text_is_read_as_the_plan_says(trainer, monkeypatch):
    """Captions while training and prompts of samples: another layer than SDXL's own, and two chunks of 75 tokens."""
    words = ", ".join(f"word{number}" for number in range(40))
    run, seen = trainer(clip_skip=3, max_token_length=150, caption_prefix=words, **BOTH), []
    real = loop.forward_loss
    monkeypatch.setattr(loop, "forward_loss", lambda unet, batch, *rest: seen.append(batch) or real(unet, batch, *rest))
    run._accumulate_gradients(0)
    (batch,), entry = seen, run.prompt_entries([words])[words]
    for text, hidden in ((batch.prompts[0], batch.encoder_hidden_states[0]), (words, entry["encoder_hidden_states"])):
        expected = encode_prompts(run.encoders, [text], clip_skip=3, max_token_length=150)[0][0]
        assert hidden.shape == expected.shape == (2 * 77, 128)
        difference = (hidden - expected).abs().max().item()
        assert difference < 1e-5, f"{text[:20]}: off by {difference}"


def test_samples_and_measurements_see_what_they_learned(trainer):
    run = trainer(sample_prompts=["a cat --n a dog"], **BOTH)
    texts = texts_of(sample_prompts(run.plan))
    before, measured = run.prompt_entries(texts), judge(run, 0)
    with torch.no_grad():
        for stem, layer in run.network.layers.items():
            if stem.startswith("lora_te"):
                layer.lora_B += 0.3
    after = run.prompt_entries(texts)
    assert list(after) == ["a cat", "a dog"] and judge(run, 0) != measured
    assert (after["a cat"]["pooled"] - before["a cat"]["pooled"]).abs().max() > 1e-3
    hidden, _ = encode_prompts(run.encoders, ["a dog"])
    assert torch.equal(after["a dog"]["encoder_hidden_states"], hidden[0].detach())


def test_captions_vary_by_view_and_repeat_after_a_resume(trainer):
    def shown(run, step):
        seen = []
        real = run.training_set.text
        object.__setattr__(run.training_set, "text", lambda index, view="": seen.append(real(index, view)) or seen[-1])
        run._accumulate_gradients(step)
        return seen
    settings = {"batch_size": 4, "caption_prefix": "p", "caption_dropout": 0.4, **BOTH}
    texts = [text for step in range(12) for text in shown(trainer(**settings), step)]
    assert 8 < texts.count("") < 32 and all(text.startswith("p caption") for text in texts if text)
    assert [text for step in range(12) for text in shown(trainer(**settings), step)] == texts
