"""200 steps of the real loop against a plain diffusers + PEFT loop: same base, same noise, the same loss at every step."""

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from peft import LoraConfig

from crumb.engine.model.keys import lora_stem
from crumb.engine.model.tiny import write_diffusers_folder
from crumb.engine.train.judge import judge
from crumb.engine.train.noise import step_generator

STEPS, RATE = 200, 2e-4
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]


@pytest.fixture
def reference(tiny_base, tmp_path):
    write_diffusers_folder(tmp_path / "folder", tiny_base, dtype=torch.float32)
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "folder" / "unet").requires_grad_(False).eval()
    names = {lora_stem(name): name for name, module in unet.named_modules()
             if isinstance(module, torch.nn.Linear) and ".attentions." in name}
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS))
    return unet, names


def test_the_loss_curve_is_a_plain_loops(trainer, reference):
    # At ten times the rate two equal loops part too, from step 100 on: rounding grows where steps are wild.
    run = trainer(steps=STEPS, batch_size=2, scheduler="constant", loss_weighting="min_snr", noise_offset=0.1,
                  max_grad_norm=1.0, learning_rate=RATE, optimizer_args={"weight_decay": 0.01})
    unet, names = reference
    for stem, layer in run.network.layers.items():
        theirs = unet.get_submodule(names[stem])
        theirs.lora_A["default"].weight.data = layer.lora_A.detach().clone()
        theirs.lora_B["default"].weight.data = layer.lora_B.detach().clone()
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    assert len(parameters) == len(run.network.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.01)
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")

    before = measured(run)
    for step in range(STEPS):
        batch = run.training_set.batch(run._batch_indices(step))
        generator = step_generator(run.plan.seed, step, 0)
        latents = (batch.latent_mean + batch.latent_std * torch.randn(batch.latent_mean.shape, generator=generator)) * 0.13025
        noise = torch.randn(latents.shape, generator=generator)
        noise = noise + 0.1 * torch.randn(*latents.shape[:2], 1, 1, generator=generator)
        timesteps = torch.randint(0, 1000, (len(latents),), generator=generator)
        prediction = unet(scheduler.add_noise(latents, noise, timesteps), timesteps, batch.encoder_hidden_states,
                          added_cond_kwargs={"text_embeds": batch.pooled, "time_ids": batch.time_ids}).sample
        snr = compute_snr(scheduler, timesteps)
        weights = torch.stack([snr, 5 * torch.ones_like(snr)], dim=1).min(dim=1)[0] / snr
        loss = ((prediction - noise).square().mean(dim=(1, 2, 3)) * weights).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ours = run.train_step(step)["loss"]
        assert abs(ours - loss.item()) < 1e-4, f"step {step}: {ours} here, {loss.item()} there"
    after = measured(run)
    assert after < 0.99 * before, f"{before} -> {after}: nothing was learned, so nothing was compared"


def measured(run) -> float:
    return judge(run, 0).training_loss
