"""Settings of the network, each against an independent computation, each with a difference where it is ignored."""

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from torch import nn
from torch.nn import functional as F

from crumb.engine.model.config import make_unet_config
from crumb.engine.network.lora import Dropout, LoRAConv2d, LoRALinear, attach_lora
from crumb.engine.network.save import save_lora
from crumb.engine.network.verify import verify_lora
from crumb.profiles.blocks import ATTENTION_BLOCKS, CONVOLUTION_BLOCKS, RESNET_BLOCKS, block_of
from crumb.profiles.errors import RequestError

CONFIG = make_unet_config((32, 64, 128), (0, 1, 2), 128, 64, 64 + 6 * 256, 16)


def new_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(**CONFIG).eval().requires_grad_(False)


def filled(network):
    for index, layer in enumerate(network.layers.values()):
        layer.lora_B.data = torch.randn(layer.lora_B.shape, generator=torch.Generator().manual_seed(index)) * 0.1
    return network


def render(unet) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return unet(torch.randn(2, 4, 16, 16, generator=generator), torch.tensor([10, 900]),
                    encoder_hidden_states=torch.randn(2, 77, 128, generator=generator),
                    added_cond_kwargs={"text_embeds": torch.randn(2, 64, generator=generator),
                                       "time_ids": torch.ones(2, 6)}).sample


def test_blocks_take_their_own_rank_alpha_and_rate(make_plan):
    plan = make_plan(targets="attention+ff+conv", rank=4, alpha=2.0, conv_rank=2, conv_alpha=1.0, lora_plus_ratio=4.0,
                     block_ranks={"IN08": 8, "OUT05": 1}, block_alphas={"IN08": 8.0},
                     conv_block_ranks={"IN01": 6, "OUT05": 3}, conv_block_alphas={"IN03": 4.0, "OUT05": 1.5},
                     block_rates={"MID": 0, "IN05": 0.5})
    network = attach_lora(new_unet(), plan)
    blocks = {block_of(stem) for stem in network.layers}
    assert blocks == set(CONVOLUTION_BLOCKS) - {"MID"}
    assert {block_of(stem) for stem, layer in network.layers.items() if layer.lora_A.shape[2:] != (3, 3)} == set(
        RESNET_BLOCKS) - {"MID"}
    for stem, layer in network.layers.items():
        block, is_conv = block_of(stem), layer.lora_A.dim() == 4 and layer.lora_A.shape[-1] == 3
        rank, alpha = {"IN08": 8, "OUT05": 1}.get(block, 4), 8.0 if block == "IN08" else 2.0
        if is_conv:
            rank, alpha = {"IN01": 6, "OUT05": 3}.get(block, 2), {"IN03": 4.0, "OUT05": 1.5}.get(block, 1.0)
        assert (layer.rank, layer.alpha, layer.lora_A.shape[0]) == (rank, alpha, rank), stem
        assert layer.rate == (0.5 if block == "IN05" else 1.0)
    groups = dict(network.rate_groups(plan.lora_plus_ratio))
    assert set(groups) == {1.0, 4.0, 0.5, 2.0}, "A and B, in IN05 and elsewhere"
    in05 = [layer for stem, layer in network.layers.items() if block_of(stem) == "IN05"]
    assert {id(p) for p in groups[0.5]} == {id(layer.lora_A) for layer in in05}
    assert {id(p) for p in groups[2.0]} == {id(layer.lora_B) for layer in in05}
    assert sum(map(len, groups.values())) == len(network.parameters())


def test_diffusers_renders_a_file_of_different_alphas_as_it_was_trained(make_plan, tmp_path):
    """diffusers misreads alphas that differ among attention modules; the file must not have any."""
    trained, loaded = new_unet(), new_unet()
    network = filled(attach_lora(trained, make_plan(
        rank=4, alpha=4.0, block_alphas={"IN08": 16.0, "OUT00": 1.0}, block_ranks={"OUT00": 2})))
    save_lora(tmp_path / "a.safetensors", network, "float", {"ss_base_model_version": "sdxl_base_v1-0"})
    state_dict, alphas = StableDiffusionXLPipeline.lora_state_dict(str(tmp_path / "a.safetensors"), unet_config=loaded.config)
    StableDiffusionXLPipeline.load_lora_into_unet(state_dict, network_alphas=alphas, unet=loaded)
    with_lora, expected, without = render(loaded), render(trained), render(new_unet())
    assert ((with_lora - expected).abs().max() / expected.abs().max()).item() < 1e-5
    assert (expected - without).abs().max() > 1e-2 * without.abs().max()
    report = verify_lora(tmp_path / "a.safetensors")
    assert report.ok and report.alphas == [4.0] and report.ranks == [2, 4]


@pytest.mark.parametrize(("settings", "words"), [
    ({"block_ranks": {"IN8": 4}}, "IN08"), ({"block_ranks": {"IN08": 4.5}}, "whole number"),
    ({"conv_block_ranks": {"IN08": 4}}, "no 3x3 convolution learns"),
    ({"conv_block_alphas": {"IN08": 4}}, "leave conv_block_alphas out"),
    ({"conv_block_ranks": {"IN08": 0}, "targets": "attention+ff+conv", "conv_rank": 4}, "whole number from 1"),
    ({"block_alphas": {"MID": 0}}, "0.1"), ({"block_rates": {"MID": -1}}, "from 0"),
    ({"block_rates": dict.fromkeys(ATTENTION_BLOCKS, 0)}, "at least one"),
    ({"optimizer": "Prodigy", "learning_rate": 1.0, "lora_plus_ratio": 4.0}, "AdamW8bit"),
    ({"optimizer": "Prodigy", "learning_rate": 1.0, "block_rates": {"MID": 0.5}}, "AdamW8bit")])
def test_block_settings_that_cannot_be_are_refused(make_plan, settings, words):
    with pytest.raises(RequestError, match=words):
        make_plan(**settings)
    assert make_plan(optimizer="Prodigy", learning_rate=1.0, block_rates={"MID": 0}).block_rates == {"MID": 0}


def layer_with(kind: str, **rates):
    torch.manual_seed(1)
    base = nn.Linear(24, 40) if kind == "linear" else nn.Conv2d(6, 10, 3, padding=1, stride=2)
    base.requires_grad_(False)
    layer = (LoRALinear if kind == "linear" else LoRAConv2d)(base, 8, 4.0, dropout=Dropout(**rates))
    nn.init.normal_(layer.lora_A, std=0.3)
    nn.init.normal_(layer.lora_B, std=0.3)
    x = torch.randn(16, 5, 24) if kind == "linear" else torch.randn(16, 6, 9, 9)
    return layer, x


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("name", ["network", "rank", "module"])
def test_dropout_is_off_outside_training_and_right_on_average(kind, name):
    """By its definition: the mean over many draws is the full change (for modules: the share that is kept)."""
    layer, x = layer_with(kind, **{name: 0.3})
    plain, _ = layer_with(kind)
    layer.eval()
    torch.testing.assert_close(layer(x), plain(x))
    layer.train()
    with torch.no_grad():
        full = (plain(x) - plain.base(x)).double()
        draws = torch.stack([(layer(x) - layer.base(x)).double() for _ in range(1500)])
    mean = draws.mean(0) / (0.7 if name == "module" else 1)
    assert ((mean - full).norm() / full.norm()).item() < 0.08
    assert draws.std(0).max() > 0.05
    if name == "module":
        is_whole = torch.isclose(draws, full, atol=1e-4).flatten(1).all(1)
        assert (is_whole | (draws.flatten(1).abs().amax(1) < 1e-5)).all() and 0.6 < is_whole.double().mean() < 0.8


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_rank_dropout_drops_whole_ranks_of_a_picture(kind):
    """With B as eyes on one rank each, an output channel is zero for all of a picture or scaled by 1 / (1 - p)."""
    layer, x = layer_with(kind, rank=0.5)
    eye = torch.eye(layer.lora_B.shape[0], 8).view(layer.lora_B.shape)
    layer.lora_B.data, layer.scaling = eye, 1.0
    layer.train()
    with torch.no_grad():
        change = layer(x) - layer.base(x)
        down = F.linear(x, layer.lora_A) if kind == "linear" else F.conv2d(x, layer.lora_A, stride=2, padding=1)
    change, down = (t if kind == "conv" else t.transpose(1, 2) for t in (change, down))
    ratio = (change[:, :8].flatten(2) / down.flatten(2)).median(2).values
    assert ((ratio - 2).abs() < 1e-3).logical_or(ratio.abs() < 1e-3).all()
    assert torch.allclose(change[:, :8].flatten(2), down.flatten(2) * ratio[..., None], atol=1e-4)
    assert 0.3 < (ratio > 1).double().mean() < 0.7 and len(ratio.round().unique(dim=0)) > 1, "each picture draws its own"


def test_max_norm_shortens_what_is_too_long_and_nothing_else(make_plan):
    network = filled(attach_lora(new_unet(), make_plan(targets="attention+ff+conv", rank=4, alpha=2.0, conv_rank=2,
                                                       conv_alpha=2.0)))
    def changes():
        return {stem: layer.lora_B.flatten(1).double() @ layer.lora_A.flatten(1).double() * layer.scaling
                for stem, layer in network.layers.items()}
    before = {stem: change.detach() for stem, change in changes().items()}
    limit = sorted(change.norm().item() for change in before.values())[len(before) // 2]
    network.limit_norms(limit)
    shortened = 0
    for stem, change in changes().items():
        expected = before[stem] * min(1.0, limit / before[stem].norm().item())
        torch.testing.assert_close(change, expected, rtol=1e-4, atol=1e-7)
        shortened += change.norm() < before[stem].norm() * 0.9999
    assert 0 < shortened < len(before)
