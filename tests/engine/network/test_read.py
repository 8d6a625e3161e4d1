"""Going on from LoRA files: kohya's, diffusers' and PEFT's names, equal and other ranks, judged by the products."""

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from crumb.engine.model.config import make_unet_config
from crumb.engine.model.keys import lora_stem
from crumb.engine.network.lora import attach_lora
from crumb.engine.network.read import start_from
from crumb.engine.network.save import lora_tensors
from crumb.profiles.errors import RequestError

CONFIG = make_unet_config((32, 64, 128), (0, 1, 2), 128, 64, 64 + 6 * 256, 16)
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]


def network_of(make_plan, **settings):
    return attach_lora(UNet2DConditionModel(**CONFIG), make_plan(**settings))


def products(network) -> dict[str, torch.Tensor]:
    return {stem: (layer.lora_B.flatten(1).double() @ layer.lora_A.flatten(1).double() * layer.scaling).detach()
            for stem, layer in network.layers.items()}


def from_tensors(tensors) -> dict[str, torch.Tensor]:
    stems = {key.split(".")[0] for key in tensors}
    def product(stem: str) -> torch.Tensor:
        down, up = (tensors[f"{stem}.lora_{kind}.weight"].flatten(1).double() for kind in ("down", "up"))
        return up @ down * (tensors[f"{stem}.alpha"].item() / len(down))
    return {stem: product(stem) for stem in stems}


@pytest.fixture
def kohya_file(make_plan, tmp_path):
    network = network_of(make_plan, targets="attention+ff+conv", rank=4, alpha=3.0, conv_rank=2, conv_alpha=1.0)
    for layer in network.layers.values():
        torch.nn.init.normal_(layer.lora_B)
    tensors = lora_tensors(network, torch.float32)
    save_file(tensors, tmp_path / "kohya.safetensors")
    return tmp_path / "kohya.safetensors", from_tensors(tensors)


@pytest.mark.parametrize(("rank", "alpha", "conv_rank"), [(4, 3.0, 2), (4, 1.0, 2), (16, 8.0, 8)])
def test_same_or_higher_rank_starts_exactly_where_the_file_ended(make_plan, kohya_file, rank, alpha, conv_rank):
    path, expected = kohya_file
    network = network_of(make_plan, targets="attention+ff+conv", rank=rank, alpha=alpha, conv_rank=conv_rank, conv_alpha=1.0)
    fresh = {stem: layer.lora_A.detach().clone() for stem, layer in network.layers.items()}
    assert start_from(network, path) == (len(expected), [])
    for stem, product in products(network).items():
        torch.testing.assert_close(product, expected[stem], rtol=1e-5, atol=1e-6)
        layer = network.layers[stem]
        assert torch.equal(layer.lora_A[4:], fresh[stem][4:]), "ranks beyond the file's stay random, so that they can learn"


def test_lower_rank_is_the_best_approximation(make_plan, kohya_file):
    path, expected = kohya_file
    network = network_of(make_plan, targets="attention+ff+conv", rank=2, alpha=1.0, conv_rank=1, conv_alpha=1.0)
    start_from(network, path)
    for stem, product in products(network).items():
        s = torch.linalg.svdvals(expected[stem])
        least = s[network.layers[stem].rank:].norm()
        assert (product - expected[stem]).norm() == pytest.approx(least.item(), rel=1e-3), stem


def test_what_the_plan_does_not_train_is_named(make_plan, kohya_file):
    path, expected = kohya_file
    network = network_of(make_plan, targets="attention", rank=4)
    num_filled, left_out = start_from(network, path)
    assert num_filled == len(network.layers) and sorted([*left_out, *network.layers]) == sorted(expected)


@pytest.mark.parametrize("form", ["diffusers", "old diffusers", "peft", "diffusers with kohya's dots"])
def test_other_programs_names(make_plan, tmp_path, form):
    unet = UNet2DConditionModel(**CONFIG)
    unet.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights=False))
    state = get_peft_model_state_dict(unet)
    modules = [key.removesuffix(".lora_A.weight") for key in state if "lora_A" in key]
    expected = {lora_stem(module): state[f"{module}.lora_B.weight"].double() @ state[f"{module}.lora_A.weight"].double()
                for module in modules}
    path = tmp_path / "pytorch_lora_weights.safetensors"
    if form == "diffusers":
        adapter = unet.peft_config["default"].to_dict()
        StableDiffusionXLPipeline.save_lora_weights(tmp_path, unet_lora_layers=state, unet_lora_adapter_metadata=adapter)
        expected = {stem: product * 2 for stem, product in expected.items()}  # its metadata say alpha 8 of rank 4
    elif form == "old diffusers":
        save_file({"unet." + key.replace("lora_A.", "lora.down.").replace("lora_B.", "lora.up."): value
                   for key, value in state.items()}, path)
    elif form == "peft":
        save_file({"unet." + key: value for key, value in state.items()}, path)
    else:
        renamed = {}
        for key, value in state.items():
            module, kind, _ = key.rsplit(".", 2)
            renamed[f"lora_unet_{module.replace('.', '_')}.{'lora_down' if kind == 'lora_A' else 'lora_up'}.weight"] = value
            renamed[f"lora_unet_{module.replace('.', '_')}.alpha"] = torch.tensor(4.0)
        save_file(renamed, path)
    network = network_of(make_plan, rank=4, alpha=2.0)
    assert start_from(network, path) == (len(expected), [])
    for stem, product in products(network).items():
        torch.testing.assert_close(product, expected[stem], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("tensors", "words"), [
    ({"lora_unet_middle_block_1_proj_in.hada_w1_a": torch.ones(2, 2)}, "LoHa"),
    ({"lora_unet_double_blocks_0_img_attn.lora_down.weight": torch.ones(2, 2)}, "other models"),
    ({"lora_unet_middle_block_1_proj_in.lora_down.weight": torch.ones(2, 128)}, "only part"),
    ({"lora_unet_middle_block_1_proj_in.lora_down.weight": torch.ones(2, 64),
      "lora_unet_middle_block_1_proj_in.lora_up.weight": torch.ones(64, 2)}, "another base"),
    ({"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(2, 64),
      "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(64, 2)}, "None of the 1 modules")])
def test_foreign_files_are_refused_in_a_sentence(make_plan, tmp_path, tensors, words):
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(RequestError, match=words):
        start_from(network_of(make_plan), tmp_path / "a.safetensors")
