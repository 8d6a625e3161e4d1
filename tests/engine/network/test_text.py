"""LoRA layers in the text encoders: names, which layers, and gradients equal to PEFT's."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

from crumb.engine.model.load import load_text_encoders
from crumb.engine.model.text import encode_prompts
from crumb.engine.model.tiny import write_sdxl
from crumb.engine.network.lora import Network
from crumb.engine.network.text import attach_text_lora
from crumb.engine.network.verify import known_stems
from crumb.profiles.base_model import inspect_base_model

LINEARS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
PROMPTS = ["a photo of a cat", "masterpiece, 1girl " * 30]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "tiny.safetensors"
    write_sdxl(path, vae=False)
    return inspect_base_model(path)


@pytest.mark.parametrize(("first", "second", "clip_skip"), [(1e-4, 5e-5, 2), (1e-4, 0.0, 2), (0.0, 2e-4, 2), (1e-4, 0.0, 1)])
def test_which_layers_learn_and_how_fast(base, make_plan, first, second, clip_skip):
    encoders = load_text_encoders(base, torch.float32)
    layers = encoders.text_encoder.config.num_hidden_layers
    network = Network()
    attach_text_lora(network, encoders, make_plan(rank=2, learning_rate=1e-4, text_encoder_learning_rate=first,
                                                  text_encoder_2_learning_rate=second, clip_skip=clip_skip))
    names = list(network.layers)
    num_first, num_second = (6 * (layers - clip_skip + 1) if first else 0), (6 * layers if second else 0)
    assert sum(name.startswith("lora_te1_") for name in names) == num_first
    assert sum(name.startswith("lora_te2_") for name in names) == num_second and len(names) == num_first + num_second
    assert set(names) <= known_stems()
    assert {layer.rate for name, layer in network.layers.items() if "te1" in name} <= {first / 1e-4}
    assert {layer.rate for name, layer in network.layers.items() if "te2" in name} <= {second / 1e-4}
    hidden, pooled = encode_prompts(encoders, PROMPTS, clip_skip, 150)
    (hidden.square().sum() + pooled.square().sum()).backward()
    assert all(layer.lora_B.grad is not None and layer.lora_B.grad.abs().sum() > 0 for layer in network.layers.values())


def test_conditioning_and_gradients_equal_pefts(base, make_plan):
    ours, theirs = load_text_encoders(base, torch.float32), load_text_encoders(base, torch.float32)
    network = Network()
    attach_text_lora(network, ours, make_plan(rank=2, alpha=1.0, learning_rate=1e-4, text_encoder_learning_rate=1e-4,
                                              text_encoder_2_learning_rate=1e-4))
    config = LoraConfig(r=2, lora_alpha=1, target_modules=LINEARS)
    adapters = {}
    for prefix, encoder in (("lora_te1_", theirs.text_encoder), ("lora_te2_", theirs.text_encoder_2)):
        inject_adapter_in_model(config, encoder)
        for name, module in encoder.named_modules():
            if hasattr(module, "lora_A"):
                name = name if name.startswith("text_model.") else f"text_model.{name}"
                adapters[prefix + name.replace(".", "_")] = module
    for index, (stem, layer) in enumerate(network.layers.items()):
        layer.lora_B.data = torch.randn(layer.lora_B.shape, generator=torch.Generator().manual_seed(index)) * 0.1
        adapters[stem].lora_A["default"].weight.data = layer.lora_A.data.clone()
        adapters[stem].lora_B["default"].weight.data = layer.lora_B.data.clone()
    results = []
    for encoders in (ours, theirs):
        hidden, pooled = encode_prompts(encoders, PROMPTS)
        (hidden * torch.linspace(-1, 1, hidden.shape[-1])).sum().add(pooled.square().sum()).backward()
        results.append((hidden.detach(), pooled.detach()))
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    for stem, layer in network.layers.items():
        for mine, peft in ((layer.lora_A, adapters[stem].lora_A), (layer.lora_B, adapters[stem].lora_B)):
            expected = peft["default"].weight.grad
            assert ((mine.grad - expected).norm() / expected.norm()).item() < 1e-4, stem
