"""Which modules learn, at SDXL's full size; the verify report on good and damaged files."""

import json

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file

from crumb.engine.model.config import make_unet_config
from crumb.engine.network.lora import attach_lora
from crumb.engine.network.save import save_lora, write_safetensors
from crumb.engine.network.verify import known_stems, report_lines, verify_lora

SDXL_METADATA = {"ss_base_model_version": "sdxl_base_v1-0"}


@pytest.mark.parametrize(("targets", "num_modules", "num_parameters_at_16"), [
    ("attention", 560, 23.22e6), ("attention+ff", 722, 42.56e6), ("attention+ff+conv", 788, 49.19e6)])
def test_full_size_sdxl_targets(make_plan, targets, num_modules, num_parameters_at_16):
    """Counts of the published file format: 722 attention modules, 66 more with convolutions."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**make_unet_config((320, 640, 1280), (0, 2, 10), 2048, 1280, 2816, 128))
    network = attach_lora(unet, make_plan(targets=targets, rank=16, alpha=8.0, conv_rank=16 if "conv" in targets else 0))
    assert len(network.layers) == num_modules and network.layers.keys() <= known_stems()
    assert network.num_parameters == pytest.approx(num_parameters_at_16, rel=1e-3)


@pytest.fixture
def network(make_plan):
    unet = UNet2DConditionModel(**make_unet_config((32, 64, 128), (0, 1, 2), 128, 64, 64 + 6 * 256, 16))
    network = attach_lora(unet, make_plan(targets="attention+ff+conv", rank=8, alpha=4.0, conv_rank=4, conv_alpha=2.0))
    for layer in network.layers.values():
        torch.nn.init.normal_(layer.lora_B)
    return network


@pytest.mark.parametrize("precision", ["float", "fp16", "bf16"])
def test_written_file_reads_back_and_is_the_same_every_time(network, tmp_path, precision):
    path = tmp_path / "a.safetensors"
    save_lora(path, network, precision, SDXL_METADATA)
    tensors = load_file(path)
    dtype = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    for stem, layer in network.layers.items():
        assert torch.equal(tensors[f"{stem}.lora_down.weight"], layer.lora_A.detach().to(dtype))
        assert torch.equal(tensors[f"{stem}.lora_up.weight"], layer.lora_B.detach().to(dtype))
        assert tensors[f"{stem}.alpha"].item() == layer.alpha and tensors[f"{stem}.alpha"].shape == ()
    save_lora(tmp_path / "b.safetensors", network, precision, SDXL_METADATA)
    assert path.read_bytes() == (tmp_path / "b.safetensors").read_bytes()

    report = verify_lora(path)
    assert report.ok and report.num_matched == len(network.layers) and report.ranks == [4, 8]
    assert "other widths than SDXL's" in report_lines(report)[-1]
    stem, layer = next(iter(network.layers.items()))
    by_hand = {}
    for stem, layer in network.layers.items():
        block = stem.removeprefix("lora_unet_").split("_")
        name = "MID" if block[0] == "middle" else f"{'IN' if block[0] == 'input' else 'OUT'}{int(block[2]):02d}"
        down, up = tensors[f"{stem}.lora_down.weight"].double(), tensors[f"{stem}.lora_up.weight"].double()
        delta = up.flatten(1) @ down.flatten(1) * layer.scaling
        by_hand[name] = by_hand.get(name, 0) + delta.square().sum().item()
    assert report.block_norms == pytest.approx({name: np.sqrt(square) for name, square in by_hand.items()}, rel=1e-4)


@pytest.mark.parametrize(("damage", "word"), [
    (lambda t: t.update({"lora_unet_down_blocks_1_attn.alpha": torch.tensor(1.0)}), "no SDXL module"),
    (lambda t: t.pop("lora_unet_middle_block_1_proj_in.alpha"), "lacks alpha"),
    (lambda t: t["lora_unet_middle_block_1_proj_in.lora_up.weight"].fill_(torch.nan), "NaN"),
    (lambda t: t.update({"lora_unet_middle_block_1_proj_in.alpha": torch.ones(1)}), "single number"),
    (lambda t: t.update({"lora_unet_middle_block_1_proj_in.lora_up.weight": torch.ones(9, 9)}), "don't fit"),
    (lambda t: t.update({"lora_unet_middle_block_1_proj_in.alpha": torch.tensor(4)}), "don't read"),
    (lambda t: t.update({"lora_unet_middle_block_1_proj_in.lora_down.weight": torch.ones(0, 128)}), "rank 0"),
    (lambda t: t["lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q.alpha"].fill_(9), "diffusers misreads"),
    (lambda t: [v.zero_() for k, v in t.items() if "lora_up" in k], "does nothing"),
])
def test_damage_is_found(network, tmp_path, damage, word):
    path = tmp_path / "a.safetensors"
    save_lora(path, network, "float", SDXL_METADATA)
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    damage(tensors)
    write_safetensors(path, tensors, SDXL_METADATA)
    report = verify_lora(path)
    assert not report.ok and word in " ".join(report.problems), report.problems


def test_a1111_would_hide_a_file_without_its_version(network, tmp_path):
    save_lora(tmp_path / "a.safetensors", network, "fp16", {"ss_v2": "False"})
    assert "A1111 hides" in " ".join(verify_lora(tmp_path / "a.safetensors").problems)


def test_hash_is_of_the_bytes_after_the_header(network, tmp_path):
    import hashlib
    path = tmp_path / "a.safetensors"
    save_lora(path, network, "fp16", SDXL_METADATA)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    with safe_open(path, "pt") as file:
        assert file.metadata()["sshs_model_hash"] == hashlib.sha256(data[8 + length:]).hexdigest()
    assert json.loads(data[8:8 + length])["__metadata__"]
