"""The loop's promises that a whole run would hide: bad steps dropped, loss scaling exact, accumulation a true mean."""

import math
from dataclasses import replace

import pytest
import torch

from crumb.engine.data.caches import write_entry
from crumb.engine.data.order import mirrored_views
from crumb.engine.train import loop
from crumb.engine.train.judge import judge
from crumb.engine.train.loop import Trainer
from crumb.engine.train.noise import step_generator
from crumb.engine.train.schedule import learning_rate_factor
from crumb.profiles.epoch import Epoch, Rotation
from crumb.profiles.errors import CrumbError, RequestError


def gradients(trainer: Trainer) -> torch.Tensor:
    trainer._accumulate_gradients(0)
    scale = trainer.scaler.get_scale()
    return torch.cat([parameter.grad.flatten() for parameter in trainer.network.parameters()]) / scale


def test_fp16_loss_scaling_gives_fp32_gradients(trainer):
    exact, scaled = gradients(trainer()), gradients(trainer(torch.float16))
    difference = ((scaled - exact).norm() / exact.norm()).item()
    assert difference < 1e-2, difference
    # Without the scale the smallest gradients would be gone: fp16 ends at 6e-8.
    assert (scaled == 0).float().mean() < 0.01


def test_bf16_gradients_follow_fp32(trainer):
    exact, rounded = gradients(trainer()), gradients(trainer(torch.bfloat16))
    cosine = torch.nn.functional.cosine_similarity(exact, rounded, dim=0).item()
    assert cosine > 0.995, cosine


def test_accumulation_is_the_mean_of_its_passes(trainer):
    together = trainer(gradient_accumulation_steps=2, batch_size=2)
    assert together._epoch(2) == 3.0, "three steps of two passes of two, of four pictures"
    loss, num_pictures, _ = together._accumulate_gradients(0)
    accumulated = torch.cat([p.grad.flatten() for p in together.network.parameters()])
    alone, losses = trainer(batch_size=2), []
    for micro_step in (0, 1):
        batch = alone.training_set.batch(alone._batch_indices(micro_step))
        inputs = loop.draw(batch, alone.plan, alone.schedule, 0.13025, step_generator(42, 0, micro_step))
        one = loop.forward_loss(alone.unet, batch, *inputs, alone.schedule, alone.plan, alone.placement).mean()
        one.backward()
        losses.append(one.item())
    summed = torch.cat([p.grad.flatten() for p in alone.network.parameters()])
    assert num_pictures == 4 and loss == pytest.approx(sum(losses) / 2, rel=1e-6)
    torch.testing.assert_close(accumulated, summed / 2, rtol=1e-5, atol=1e-8)


def test_the_loss_is_weighted_by_subset_over_the_number_of_pictures(trainer):
    """Weights 1, 1, 0.25, 0: the sum of weight times loss over 4, also in its gradient."""
    weighted, plain = trainer(batch_size=4), trainer(batch_size=4)
    subset = weighted.training_set.subsets[0]
    weights = [1.0, 1.0, 0.25, 0.0]
    weighted.training_set.subsets[:] = [replace(subset, loss_weight=weight) for weight in weights]
    weighted.training_set.pictures[:] = [replace(p, subset=n) for n, p in enumerate(weighted.training_set.pictures)]
    loss, _, _ = weighted._accumulate_gradients(0)

    indices = plain._batch_indices(0)
    batch = plain.training_set.batch(indices)
    assert batch.weights.tolist() == [1.0] * 4
    inputs = loop.draw(batch, plain.plan, plain.schedule, 0.13025, step_generator(42, 0, 0))
    losses = loop.forward_loss(plain.unet, batch, *inputs, plain.schedule, plain.plan, plain.placement)
    expected = sum(weights[index] * one for index, one in zip(indices, losses)) / 4
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-6) and loss != pytest.approx(losses.mean().item(), rel=1e-2)
    for ours, theirs in zip(weighted.network.parameters(), plain.network.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-8)


def test_masks_reach_the_loss(trainer, tmp_path):
    """The loop's own loss under a mask, against the prediction weighted by hand in float64."""
    run = trainer(batch_size=1, mask_floor=0.1)
    mask = torch.zeros(1, 16, 16)
    mask[:, 4:8, 2:] = 0.5
    (index,) = run._batch_indices(0)
    run.training_set.mask_paths[index] = tmp_path / "masks" / "m" / "0.safetensors"
    write_entry(run.training_set.mask_paths[index], {"mask": mask})
    loss, _, _ = run._accumulate_gradients(0)

    batch = run.training_set.batch([index])
    noisy, target, timesteps = loop.draw(batch, run.plan, run.schedule, 0.13025, step_generator(42, 0, 0))
    with torch.no_grad():
        prediction = run.unet(noisy, timesteps, batch.encoder_hidden_states, added_cond_kwargs={
            "text_embeds": batch.pooled, "time_ids": batch.time_ids}).sample
    weights = (0.1 + 0.9 * mask.double()).expand(4, -1, -1)
    squares = (prediction - target).double()[0].square()
    assert loss == pytest.approx(((squares * weights).sum() / weights.sum()).item(), rel=1e-5)
    assert loss != pytest.approx(squares.mean().item(), rel=1e-3)


def test_half_of_the_views_are_mirrored_and_a_resumed_run_mirrors_the_same(trainer, tmp_path, monkeypatch):
    run, seen = trainer(batch_size=2, seed=5), []
    for index in (0, 1, 2):
        run.training_set.mirrored_paths[index] = tmp_path / "mirrored" / "m" / f"{index}.safetensors"
        write_entry(run.training_set.mirrored_paths[index], {"mean": torch.full((4, 16, 16), float(index)),
                                                             "std": torch.zeros(4, 16, 16)})

    def forward(unet, batch, *rest):
        means = batch.latent_mean.flatten(1)
        seen.append([mean[0].item() if (mean == mean[0]).all() else None for mean in means])
        return sum(p.sum() for p in run.network.parameters()) * torch.zeros(len(means))

    monkeypatch.setattr(loop, "forward_loss", forward)
    for step in range(300):
        run._accumulate_gradients(step)
    first = list(seen)
    for step in (299, 7, 8):
        seen.clear()
        run._accumulate_gradients(step)
        assert seen == [first[step]], "which are mirrored must follow from the step alone"
    views = [view for step, row in enumerate(first) for view in zip(run._batch_indices(step), row)]
    assert all(mirrored in (None, float(index)) and (index != 3 or mirrored is None) for index, mirrored in views)
    may_be = [mirrored is not None for index, mirrored in views if index != 3]
    assert 0.42 < sum(may_be) / len(may_be) < 0.58


def test_the_seed_decides_all_that_is_random(trainer, monkeypatch):
    """The LoRA's start, the order of pictures, which are mirrored, noise and noise levels, dropout: each of its own."""
    def drawn(seed: int) -> dict[str, list]:
        run = trainer(seed=seed, batch_size=2, gradient_accumulation_steps=2)
        seen = {"start": [next(iter(run.network.layers.values())).lora_A.tolist()],
                "order": [run._batch_indices(number) for number in range(20)], "mirrored": [], "noise": [], "levels": [],
                "dropout": []}

        def forward(unet, batch, noisy_latents, target, timesteps, *rest):
            for name, value in (("noise", target.flatten()[:4].tolist()), ("levels", timesteps.tolist()),
                                ("dropout", torch.initial_seed())):
                seen[name].append(value)
            return sum(p.sum() for p in run.network.parameters()) * torch.zeros(2)

        real = mirrored_views
        monkeypatch.setattr(loop, "forward_loss", forward)
        monkeypatch.setattr(loop, "mirrored_views", lambda *numbers: seen["mirrored"].append(real(*numbers)) or real(*numbers))
        for step in range(4):
            run._accumulate_gradients(step)
        return seen

    first, again, other = drawn(7), drawn(7), drawn(8)
    for name, values in first.items():
        assert values == again[name] and values != other[name], name
        assert name in ("start", "order", "mirrored") or len({str(value) for value in values}) == 8, f"{name} repeats itself"


def test_each_epoch_shows_the_next_regularization_pictures(trainer):
    """Two training pictures and five of regularization: two of these an epoch, in turn."""
    run = trainer(batch_size=1)
    run = replace(run, training_set=replace(run.training_set, epoch=Epoch(
        {(128, 128): [0, 1]}, {(128, 128): Rotation([2, 3, 2, 3, 3], 2)})))
    epochs = [sorted(index for number in range(4) for index in run._batch_indices(4 * epoch + number)) for epoch in range(5)]
    assert epochs == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 3, 3]]
    assert run._epoch(3) == 1.0


def test_a_nan_step_changes_nothing_and_is_counted(trainer, monkeypatch):
    run = trainer()
    run.train_step(0)
    before = [parameter.detach().clone() for parameter in run.network.parameters()]
    real = loop.forward_loss
    monkeypatch.setattr(loop, "forward_loss", lambda *arguments: real(*arguments) * math.nan)
    fields = run.train_step(1)
    assert fields["skipped"] and fields["loss"] is None and run.skipped_in_a_row == 1
    assert all(torch.equal(old, new) for old, new in zip(before, run.network.parameters()))
    monkeypatch.setattr(loop, "forward_loss", real)
    assert "skipped" not in run.train_step(2) and run.skipped_in_a_row == 0

    monkeypatch.setattr(loop, "forward_loss", lambda *arguments: real(*arguments) * math.nan)
    with pytest.raises(CrumbError, match="lower learning rate"):
        for step in range(3, 60):
            run.train_step(step)


def test_the_smoothed_loss_is_the_weighted_mean_of_all_so_far_but_the_dropped(trainer):
    """0.98 to the power of its age is a loss's weight; the first leads no longer than its share."""
    run, losses = trainer(), [4.0, 2.0, math.nan, 1.0, 3.0]
    run._accumulate_gradients = lambda step: (losses[step], 1, 0.0)
    shown = [run.train_step(step)["loss_smoothed"] for step in range(5)]
    by_hand = [4.0, (0.98 * 4 + 2) / 1.98, (0.98 * 4 + 2) / 1.98, (0.9604 * 4 + 0.98 * 2 + 1) / 2.9404,
               (0.941192 * 4 + 0.9604 * 2 + 0.98 * 1 + 3) / 3.881592]
    assert shown == pytest.approx(by_hand, rel=1e-12), (shown, by_hand)


@pytest.mark.parametrize("max_grad_norm", [0.01, 0])
def test_clipping_bounds_the_gradient(trainer, max_grad_norm):
    """0 leaves it as it is."""
    run = trainer(max_grad_norm=max_grad_norm, optimizer_args={"weight_decay": 0.0})
    seen = []
    step = run.optimizer.step
    run.optimizer.step = lambda *a, **k: (seen.append(gradient_norm(run)), step(*a, **k))
    fields = run.train_step(0)
    assert fields["grad_norm"] > 0.01 and seen[0] == pytest.approx(max_grad_norm or fields["grad_norm"], rel=1e-3)


@pytest.mark.parametrize(("optimizer", "settings"), [
    ("AdamW", {"learning_rate": 1e-3}),
    ("AdamW8bit", {"learning_rate": 1e-3}),
    ("Prodigy8bit", {"learning_rate": 1.0, "optimizer_args": {"d_coef": 2.0, "betas": [0.9, 0.999], "decouple": True}}),
    ("Prodigy", {"learning_rate": 1.0, "optimizer_args": {"d_coef": 2.0, "betas": [0.9, 0.999], "decouple": True}}),
    ("DAdaptAdam", {"learning_rate": 1.0, "optimizer_args": {"decouple": True, "weight_decay": 0.01, "d0": 1e-4}}),
    ("Adafactor", {"optimizer_args": {"scale_parameter": False}}),
    ("Lion", {"learning_rate": 2e-4})])
def test_each_optimizer_learns_one_fixed_batch(trainer, monkeypatch, optimizer, settings):
    monkeypatch.setattr(loop, "step_generator", lambda seed, step, micro: step_generator(seed, 0, max(micro, 0)))
    run = trainer(optimizer=optimizer, batch_size=4, steps=40, **settings)
    losses = [run.train_step(step)["loss"] for step in range(40)]
    assert losses[-1] < 0.97 * losses[0], losses


def test_wrong_optimizer_arguments_are_a_sentence(trainer):
    with pytest.raises(RequestError, match="optimizer_args"):
        trainer(optimizer_args={"betas": [0.9, 7.0]})


def test_warmup_rises_evenly_to_one():
    factors = [learning_rate_factor("constant_with_warmup", step, 100, 0.1) for step in range(100)]
    assert factors[:11] == pytest.approx([n / 11 for n in range(1, 12)]) and set(factors[10:]) == {1.0}
    assert {learning_rate_factor("constant", step, 100, 0.1) for step in range(100)} == {1.0}


def test_every_step_takes_its_rate_from_the_plan(trainer):
    """Half of ten steps warm up, by sixths of 1e-3; lora_up at four times the rate."""
    run = trainer(steps=10, learning_rate=1e-3, scheduler="constant_with_warmup", warmup_ratio=0.5, lora_plus_ratio=4.0)
    run._accumulate_gradients = lambda step: (1.0, 1, 0.0)
    for step, expected in enumerate([1e-3 * min(1, number / 6) for number in range(1, 11)]):
        assert run.train_step(step)["learning_rate"] == pytest.approx(expected)
        assert [group["lr"] for group in run.optimizer.param_groups] == pytest.approx([expected, 4 * expected])


def test_fp16_clips_the_true_gradient_not_the_scaled_one(trainer):
    exact = trainer(max_grad_norm=0.05).train_step(0)["grad_norm"]
    run = trainer(torch.float16, max_grad_norm=0.05)
    applied = []
    step = run.optimizer.step
    run.optimizer.step = lambda *a, **k: (applied.append(gradient_norm(run)), step(*a, **k))
    assert run.train_step(0)["grad_norm"] == pytest.approx(exact, rel=1e-2)
    assert applied == [pytest.approx(0.05, rel=1e-3)]


def gradient_norm(run: Trainer) -> float:
    return torch.cat([parameter.grad.flatten() for parameter in run.network.parameters()]).norm().item()


def change_of_one_step(run: Trainer) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    before = {stem: (layer.lora_A.detach().clone(), layer.lora_B.detach().clone())
              for stem, layer in run.network.layers.items()}
    run.train_step(0)
    return {stem: (layer.lora_A.detach() - before[stem][0], layer.lora_B.detach() - before[stem][1])
            for stem, layer in run.network.layers.items()}


def test_rates_of_blocks_and_of_lora_up_are_kept_to(trainer):
    """AdamW's first step moves every value by the rate itself."""
    run = trainer(block_rates={"MID": 0.5}, lora_plus_ratio=4.0, scheduler="constant", optimizer_args={"weight_decay": 0.0})
    for stem, (A, B) in change_of_one_step(run).items():
        rate = 1e-3 * (0.5 if "middle" in stem else 1.0)
        assert A.abs().median().item() == pytest.approx(rate, rel=1e-2), stem
        assert B.abs().median().item() == pytest.approx(4 * rate, rel=1e-2), stem


def test_norms_are_limited_after_each_step(trainer):
    run = trainer(max_norm=0.05)
    run.train_step(0)
    norms = [(layer.lora_B.flatten(1) @ layer.lora_A.flatten(1) * layer.scaling).norm().item()
             for layer in run.network.layers.values()]
    assert max(norms) == pytest.approx(0.05, rel=1e-3)


@pytest.mark.parametrize("setting", ["network_dropout", "rank_dropout", "module_dropout"])
def test_dropout_acts_in_steps_repeatably_and_not_in_measurements(trainer, setting):
    runs = [trainer(), trainer(**{setting: 0.5}), trainer(**{setting: 0.5})]
    measured = {judge(run, 0) for run in runs}
    assert len(measured) == 1
    plain, dropped, again = (run.train_step(0)["loss"] for run in runs)
    assert plain != dropped == again
