"""Going on from LoRA files: kohya's, diffusers' and PEFT's names, equal and other ranks, judged by the products."""

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from crumb.engine.model.config import make_unet_config
from crumb.engine.model.keys import lora_stem
from crumb.engine.model.load import load_text_encoders
from crumb.engine.model.tiny import write_sdxl
from crumb.engine.network.lora import attach_lora
from crumb.engine.network.read import read_lora, start_from
from crumb.engine.network.save import lora_tensors
from crumb.profiles.base_model import inspect_base_model
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


def scales_in_diffusers(folder) -> dict[str, float]:
    unet = UNet2DConditionModel(**CONFIG)
    state, alphas, metadata = StableDiffusionXLPipeline.lora_state_dict(str(folder), unet_config=unet.config,
                                                                        return_lora_metadata=True)
    StableDiffusionXLPipeline.load_lora_into_unet(state, network_alphas=alphas, unet=unet, metadata=metadata)
    return {lora_stem(name): next(iter(layer.scaling.values())) for name, layer in unet.named_modules()
            if hasattr(layer, "lora_A")}


def test_patterns_that_overlap_count_in_the_files_order(tmp_path):
    unet = UNet2DConditionModel(**CONFIG)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, alpha_pattern={"to_k": 2, r"attn1\.to_k": 6, "proj": 3})
    unet.add_adapter(config)
    StableDiffusionXLPipeline.save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(unet),
                                                unet_lora_adapter_metadata=config.to_dict())
    found = {stem: change.scale for stem, change in read_lora(tmp_path / "pytorch_lora_weights.safetensors").items()}
    assert found == scales_in_diffusers(tmp_path) and {0.5, 1.5, 2.0} <= set(found.values())


@pytest.mark.parametrize("form", ["patterns", "rslora", "no metadata", "text encoder without"])
def test_alphas_are_those_that_peft_trained_with(tmp_path, form):
    """A file as diffusers writes it, with a LoraConfig for each model; the scales are those of PEFT's layers.

    diffusers sorts patterns as it writes them, so what was trained is judged with sorted ones alone, and any others by
    what diffusers itself loads.
    """
    write_sdxl(tmp_path / "tiny.safetensors", vae=False)
    encoders = load_text_encoders(inspect_base_model(tmp_path / "tiny.safetensors"), torch.float32)
    models = {"unet": UNet2DConditionModel(**CONFIG), "text_encoder": encoders.text_encoder,
              "text_encoder_2": encoders.text_encoder_2}
    linears = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
    configs = {"unet": {"r": 4, "lora_alpha": 8, "target_modules": TARGETS},
               "text_encoder": {"r": 2, "lora_alpha": 3, "target_modules": linears},
               "text_encoder_2": {"r": 4, "lora_alpha": 6, "target_modules": linears}}
    if form == "patterns":
        configs["unet"] |= {"rank_pattern": {"to_q": 8}, "alpha_pattern": {
            r".*down_blocks\.1\..*to_k": 1, "attn1.to_k": 5, "to_q": 2}}
        configs["text_encoder"] |= {"alpha_pattern": {"fc1": 16, r"layers\.0\.self_attn\.q_proj": 12}}
    elif form == "rslora":
        configs["unet"] |= {"use_rslora": True}
    saved, expected = {}, {}
    for part, model in models.items():
        inject_adapter_in_model(LoraConfig(**configs[part], init_lora_weights=False), model)
        saved[f"{part}_lora_layers"] = get_peft_model_state_dict(model)
        if form != "no metadata" and (part, form) != ("text_encoder", "text encoder without"):
            saved[f"{part}_lora_adapter_metadata"] = model.peft_config["default"].to_dict()
        with_metadata = f"{part}_lora_adapter_metadata" in saved
        for name, layer in model.named_modules():
            if hasattr(layer, "lora_A"):
                text_name = name if name.startswith("text_model.") else f"text_model.{name}"
                encoder = "lora_te2" if part == "text_encoder_2" else "lora_te1"
                stem = lora_stem(name) if part == "unet" else f"{encoder}_{text_name.replace('.', '_')}"
                expected[stem] = layer.scaling["default"] if with_metadata else 1.0
    StableDiffusionXLPipeline.save_lora_weights(tmp_path, **saved)
    found = {stem: change.scale for stem, change in read_lora(tmp_path / "pytorch_lora_weights.safetensors").items()}
    assert found == pytest.approx(expected)
    if form in ("patterns", "rslora"):
        assert scales_in_diffusers(tmp_path) == {stem: scale for stem, scale in found.items() if "_te" not in stem}
    if form == "patterns":
        by_hand = {"lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_k": 1 / 4,
                   "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_k": 5 / 4,
                   "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_k": 8 / 4,
                   "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q": 2 / 8,
                   "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_v": 8 / 4,
                   "lora_te1_text_model_encoder_layers_0_mlp_fc1": 16 / 2,
                   "lora_te1_text_model_encoder_layers_0_self_attn_q_proj": 12 / 2,
                   "lora_te1_text_model_encoder_layers_0_self_attn_k_proj": 3 / 2,
                   "lora_te2_text_model_encoder_layers_0_mlp_fc1": 6 / 4}
        assert {stem: found[stem] for stem in by_hand} == by_hand


@pytest.mark.parametrize("text", ["{", "[]", '{"unet.lora_alpha": "much"}', '{"unet.lora_alpha": null}',
                                  '{"unet.alpha_pattern": {"(": 1}}', '{"unet.alpha_pattern": 3}'])
def test_metadata_that_mean_nothing_are_refused(tmp_path, text):
    name = "unet.mid_block.attentions.0.proj_in"
    save_file({f"{name}.lora_A.weight": torch.ones(2, 128), f"{name}.lora_B.weight": torch.ones(128, 2)},
              tmp_path / "a.safetensors", {"lora_adapter_metadata": text})
    with pytest.raises(RequestError, match="lora_adapter_metadata in its metadata can't be read"):
        read_lora(tmp_path / "a.safetensors")


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
