"""One training step against diffusers + PEFT: same base, same noise and timesteps, nothing of ours in the reference."""

import copy
import re

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig

from crumb.engine.data.prepare import Batch
from crumb.engine.memory.placement import Placement
from crumb.engine.model.keys import lora_stem
from crumb.engine.model.load import load_unet
from crumb.engine.model.tiny import write_diffusers_folder
from crumb.engine.network.lora import attach_lora
from crumb.engine.train.noise import add_noise, alphas_cumprod, prediction_target
from crumb.engine.train.step import forward_loss
from crumb.profiles.base_model import inspect_base_model

RANK, ALPHA = 4, 2.0
PEFT_TARGETS = {
    "attention": ["to_q", "to_k", "to_v", "to_out.0"],
    "attention+ff": ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"],
    "attention+ff+conv": ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1",
                          "conv2", "time_emb_proj", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"],
}

# With 32 channels in 32 norm groups, the norm takes out again what the time embedding adds: these gradients are zero
# but for rounding, on both sides.
CANCELLED = re.compile(r"lora_unet_(input_blocks_[12]|output_blocks_[678])_0_emb_layers_1")


@pytest.fixture(scope="module")
def diffusers_folder(tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("diffusers")
    write_diffusers_folder(folder, tiny_base, dtype=torch.float32)
    return folder


def random_batch(generator):
    def random(*size):
        return torch.randn(*size, generator=generator)
    batch = Batch(random(2, 4, 16, 8), torch.zeros(2, 4, 16, 8), random(2, 77, 128), random(2, 64),
                  torch.tensor([[700.0, 512.0, 0, 3, 128, 64], [300.0, 301.0, 5, 0, 128, 64]]), torch.ones(2))
    return batch, random(2, 4, 16, 8), torch.tensor([17, 912])


@pytest.mark.parametrize(("targets", "prediction_type", "checkpointing"), [
    ("attention", "epsilon", False), ("attention+ff", "epsilon", False), ("attention+ff", "v_prediction", False),
    ("attention+ff+conv", "epsilon", False), ("attention+ff+conv", "v_prediction", False),
    ("attention+ff+conv", "epsilon", True)])
def test_loss_and_gradients(tiny_base, diffusers_folder, make_plan, targets, prediction_type, checkpointing):
    generator = torch.Generator().manual_seed(5)
    unet = load_unet(inspect_base_model(tiny_base), torch.float32)
    plan = make_plan(prediction_type=prediction_type, targets=targets, rank=RANK, alpha=ALPHA, conv_alpha=ALPHA,
                     conv_rank=RANK if "conv" in targets else 0)
    network = attach_lora(unet, plan)
    for layer in network.layers.values():
        layer.lora_B.data = torch.randn(layer.lora_B.shape, generator=generator) * 0.05
    if checkpointing:
        unet.enable_gradient_checkpointing()
    batch, noise, timesteps = random_batch(generator)
    latents = batch.latent_mean
    schedule = alphas_cumprod(False)
    target = prediction_target(latents, noise, timesteps, schedule, prediction_type)
    placement = Placement(torch.device("cpu"), torch.float32)
    loss = forward_loss(unet, batch, add_noise(latents, noise, timesteps, schedule), target, timesteps, schedule,
                        plan, placement).mean()
    loss.backward()

    reference = UNet2DConditionModel.from_pretrained(diffusers_folder / "unet").requires_grad_(False)
    names = {lora_stem(name): name for name, _ in reference.named_modules() if _is_target(name)}
    reference.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=PEFT_TARGETS[targets]))
    for stem, layer in network.layers.items():
        theirs = reference.get_submodule(names[stem])
        theirs.lora_A["default"].weight.data = copy.deepcopy(layer.lora_A.data)
        theirs.lora_B["default"].weight.data = copy.deepcopy(layer.lora_B.data).reshape(theirs.lora_B["default"].weight.shape)
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                              prediction_type=prediction_type)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    target = noise if prediction_type == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)
    prediction = reference(noisy, timesteps, batch.encoder_hidden_states,
                           added_cond_kwargs={"text_embeds": batch.pooled, "time_ids": batch.time_ids}).sample
    expected = torch.nn.functional.mse_loss(prediction, target)
    expected.backward()

    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    num_adapters = sum("lora_A" in name for name, _ in reference.named_parameters())
    assert len(network.layers) == num_adapters
    worst = {}
    for stem, layer in network.layers.items():
        if CANCELLED.fullmatch(stem):
            assert max(layer.lora_A.grad.abs().max(), layer.lora_B.grad.abs().max()) < 1e-6
            continue
        theirs = reference.get_submodule(names[stem])
        for ours, their in ((layer.lora_A, theirs.lora_A), (layer.lora_B, theirs.lora_B)):
            gradient = their["default"].weight.grad.reshape(ours.shape)
            worst[stem] = max(worst.get(stem, 0), ((ours.grad - gradient).norm() / gradient.norm()).item())
    name, difference = max(worst.items(), key=lambda item: item[1])
    assert difference < 1e-5, f"gradient of {name} differs by {difference:.2e}"


def _is_target(name: str) -> bool:
    try:
        lora_stem(name)
    except ValueError:
        return False
    return True


def test_zero_terminal_snr_equals_diffusers():
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=True)
    difference = (alphas_cumprod(True) - scheduler.alphas_cumprod).abs().max()
    assert difference < 1e-6, difference
    assert alphas_cumprod(True)[-1] == 0
