"""A LoRA file in a network gives the same as its weights added to the base by hand, at any strength."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from crumb.engine.model.config import make_unet_config
from crumb.engine.network.load import put_lora, set_strength
from crumb.engine.network.lora import attach_lora
from crumb.engine.network.save import save_lora, write_safetensors
from crumb.profiles.errors import CrumbError
from crumb.profiles.plan import Plan


def make_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(**make_unet_config((32, 64, 128), (0, 1, 2), 128, 64, 64 + 6 * 256, 16)).eval()


def attach(unet, rank, alpha):
    return attach_lora(unet, Plan(name="t", created="2026-01-01T00:00:00+00:00", base_model="b", images="p", rank=rank,
                                  alpha=alpha, targets="attention+ff+conv", conv_rank=4, conv_alpha=2.0))


def run(unet) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return unet(torch.randn(1, 4, 16, 16, generator=generator), torch.tensor([500]),
                    torch.randn(1, 77, 128, generator=generator),
                    added_cond_kwargs={"text_embeds": torch.ones(1, 64), "time_ids": torch.ones(1, 6)}).sample


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    network = attach(make_unet(), rank=8, alpha=6.0)
    for index, layer in enumerate(network.layers.values()):
        layer.lora_B.data = torch.randn(layer.lora_B.shape, generator=torch.Generator().manual_seed(index)) * 0.05
    path = tmp_path_factory.mktemp("lora") / "a.safetensors"
    save_lora(path, network, "float", {})
    return path


def merged(file, strength: float) -> UNet2DConditionModel:
    """up @ down * alpha / rank * strength, added to the weights."""
    unet, tensors = make_unet(), load_file(file)
    for stem, layer in attach(make_unet(), 8, 6.0).layers.items():
        down, up = tensors[f"{stem}.lora_down.weight"].double(), tensors[f"{stem}.lora_up.weight"].double()
        delta = up.flatten(1) @ down.flatten(1) * (tensors.get(f"{stem}.alpha", down.new_tensor(down.shape[0])) / down.shape[0])
        matches = [module for module in unet.modules() if getattr(module, "weight", None) is not None
                   and module.weight.shape == layer.base.weight.shape and torch.equal(module.weight, layer.base.weight)]
        matches[0].weight.data = (matches[0].weight.data.double() + strength * delta.reshape(layer.base.weight.shape)).float()
    return unet


@pytest.mark.parametrize("strength", [1.0, 0.6, -0.5])
def test_equals_weights_added_by_hand(file, strength):
    """The network was made with another rank and alpha than the file's: the file's count."""
    unet = make_unet()
    network = attach(unet, rank=2, alpha=1.0)
    put_lora(network, file)
    set_strength(network, strength)
    expected, base = run(merged(file, strength)), run(make_unet())
    assert (run(unet) - expected).abs().max() < 1e-4 * (expected - base).abs().max()


def test_strength_0_is_the_base_and_files_leave_no_trace(file, tmp_path):
    unet = make_unet()
    network = attach(unet, rank=8, alpha=6.0)
    put_lora(network, file)
    first = run(unet)
    set_strength(network, 0.0)
    torch.testing.assert_close(run(unet), run(make_unet()), rtol=0, atol=1e-5)

    few = {key: tensor for key, tensor in load_file(file).items() if "middle" in key and not key.endswith("alpha")}
    write_safetensors(tmp_path / "few.safetensors", few, {})
    put_lora(network, tmp_path / "few.safetensors")
    assert not torch.equal(run(unet), first)
    put_lora(network, file)
    assert torch.equal(run(unet), first)


@pytest.mark.parametrize(("damage", "word"), [
    (lambda t: t.update({"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(2, 8),
                         "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(8, 2)}), "does not train"),
    (lambda t: t.update({"lora_unet_middle_block_1_proj_in.lora_down.weight": torch.ones(8, 7)}), "don't fit"),
    (lambda t: t.update({"lora_unet_middle_block_1_proj_in.dora_scale": torch.ones(8)}), "plain SDXL LoRA"),
    (lambda t: t["lora_unet_middle_block_1_proj_in.lora_up.weight"].fill_(torch.nan), "NaN"),
])
def test_files_that_do_not_fit_are_refused(file, tmp_path, damage, word):
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    damage(tensors)
    write_safetensors(tmp_path / "bad.safetensors", tensors, {})
    network = attach(make_unet(), rank=8, alpha=6.0)
    with pytest.raises(CrumbError, match=word):
        put_lora(network, tmp_path / "bad.safetensors")
    (tmp_path / "half.safetensors").write_bytes(file.read_bytes()[:1000])
    for gone, word in (("half.safetensors", "truncated"), ("none.safetensors", "none.safetensors")):
        with pytest.raises(CrumbError, match=word):
            put_lora(network, tmp_path / gone)
