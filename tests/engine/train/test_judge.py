"""Judging repeats itself exactly, equals a mean by hand, and leaves the trained U-Net as it was."""

from dataclasses import replace

import pytest
import torch

from crumb.engine.data.caches import write_entry
from crumb.engine.train import judge as judge_module
from crumb.engine.train.judge import judge, mean_loss
from crumb.engine.train.noise import alphas_cumprod, step_generator


def test_the_same_weights_give_the_same_numbers_and_a_step_changes_them(trainer):
    run = trainer()
    run.training_set.held_out.append(3)
    first, again = judge(run, 0), judge(run, 0)
    assert first == again and first.held_out_loss != first.training_loss
    run.train_step(0)
    assert judge(run, 1).training_loss != first.training_loss
    run.training_set.held_out.clear()
    assert judge(run, 1).held_out_loss is None


def test_training_goes_on_as_if_nobody_had_judged(trainer):
    plain, judged = trainer(), trainer()
    for step in range(3):
        judge(judged, step)
        assert judged.train_step(step)["loss"] == plain.train_step(step)["loss"]


def test_neither_mirrored_nor_regularization_pictures_are_measured(trainer):
    run = trainer()
    first = judge(run, 0)
    for index in range(4):
        run.training_set.mirrored_paths[index] = run.training_set.latent_paths[index - 1]
    assert judge(run, 0) == first
    subset = run.training_set.subsets[0]
    run.training_set.subsets[:] = [subset, replace(subset, regularization=True)]
    run.training_set.pictures[1] = replace(run.training_set.pictures[1], subset=1)
    expected = mean_loss(run, [0, 2, 3], run.plan)
    assert judge(run, 0).training_loss == expected != first.training_loss


@pytest.mark.parametrize(("batch_size", "masked"), [(1, False), (3, False), (8, False), (3, True)])
def test_mean_by_hand_and_independent_of_batch_size(trainer, batch_size, masked, tmp_path):
    run = trainer(batch_size=batch_size, loss_type="huber", loss_weighting="min_snr", mask_floor=0.25)
    counts = torch.ones(16, 16, dtype=torch.float64)
    if masked:
        counts = torch.full_like(counts, 0.25)
        counts[:, :3] = 1
        for index in (0, 2):
            run.training_set.mask_paths[index] = tmp_path / "masks" / "m" / f"{index}.safetensors"
            write_entry(run.training_set.mask_paths[index], {"mask": (counts == 1).float()[None]})
    plain = replace(run.plan, loss_type="l2", loss_weighting="none")
    schedule, expected = alphas_cumprod(False).double(), []
    for index in (0, 2):
        generator = step_generator(42, index, -2)
        batch = run.training_set.batch([index])
        for timestep in (100, 300, 500, 700, 900):
            noise = torch.randn((1, 4, 16, 16), generator=generator)
            noisy = schedule[timestep].sqrt() * batch.latent_mean * 0.13025 + (1 - schedule[timestep]).sqrt() * noise
            with torch.no_grad():
                prediction = run.unet(noisy.float(), torch.tensor([timestep]), batch.encoder_hidden_states,
                                      added_cond_kwargs={"text_embeds": batch.pooled, "time_ids": batch.time_ids}).sample
            squares = (prediction - noise).double().square() * counts
            expected.append((squares.sum() / (4 * counts.sum())).item())
    got = mean_loss(run, [0, 2], plain)
    assert got == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    chosen = judge_module._some([0, 2], 42)
    assert chosen == [0, 2]


def test_levels_are_those_that_are_trained_and_no_number_is_none(trainer):
    assert judge(trainer(timestep_max=300), 0).training_loss != judge(trainer(), 0).training_loss
    run = trainer()
    next(iter(run.network.layers.values())).lora_B.data.fill_(torch.nan)
    assert (judge(run, 1).training_loss, judge(run, 1).held_out_loss) == (None, None)
