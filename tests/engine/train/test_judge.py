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


@pytest.mark.parametrize(("batch_size", "num_passes", "prediction_type", "masked"), [
    (1, 5, "epsilon", False), (3, 2, "v_prediction", False), (8, 1, "epsilon", False), (3, 2, "epsilon", True)])
def test_mean_by_hand_and_independent_of_batch_size(trainer, batch_size, num_passes, prediction_type, masked, tmp_path):
    run = trainer(batch_size=batch_size, loss_type="huber", loss_weighting="min_snr", prediction_type=prediction_type, seed=7,
                  timestep_min=100, timestep_max=600, mask_floor=0.25)
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
        generator = step_generator(7, index, -2)
        batch = run.training_set.batch([index])
        for timestep in (150, 250, 350, 450, 550):
            noise, latents = torch.randn((1, 4, 16, 16), generator=generator), batch.latent_mean * 0.13025
            signal, spread = schedule[timestep].sqrt(), (1 - schedule[timestep]).sqrt()
            noisy = signal * latents + spread * noise
            target = noise if prediction_type == "epsilon" else signal * noise - spread * latents
            with torch.no_grad():
                prediction = run.unet(noisy.float(), torch.tensor([timestep]), batch.encoder_hidden_states,
                                      added_cond_kwargs={"text_embeds": batch.pooled, "time_ids": batch.time_ids}).sample
            squares = (prediction - target).double().square() * counts
            expected.append((squares.sum() / (4 * counts.sum())).item())
    passes = []
    run.unet.register_forward_hook(lambda *_: passes.append(1))
    got = mean_loss(run, [0, 2], plain)
    assert got == pytest.approx(sum(expected) / len(expected), rel=1e-5) and len(passes) == 2 * num_passes
    chosen = judge_module._some([0, 2], 42)
    assert chosen == [0, 2]


def test_the_seed_chooses_the_pictures_where_there_are_many(trainer, monkeypatch):
    run, measured = trainer(), []
    monkeypatch.setattr(judge_module, "NUM_JUDGED", 1)
    monkeypatch.setattr(judge_module, "mean_loss", lambda run, indices, plan: measured.append(indices) or 1.0)
    for seed in range(12):
        judge(replace(run, plan=replace(run.plan, seed=seed)), 0)
    assert len(measured) == 12 and {len(indices) for indices in measured} == {1}
    assert {index for indices in measured for index in indices} == {0, 1, 2, 3}, measured


def test_levels_are_those_that_are_trained_and_no_number_is_none(trainer):
    assert judge(trainer(timestep_max=300), 0).training_loss != judge(trainer(), 0).training_loss
    run = trainer()
    next(iter(run.network.layers.values())).lora_B.data.fill_(torch.nan)
    assert (judge(run, 1).training_loss, judge(run, 1).held_out_loss) == (None, None)
