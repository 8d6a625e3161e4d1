"""Frozen layers: a base in int8 or NF4 computes with the weights that it keeps."""

import pytest
import torch
from torch import nn

from crumb.engine.model.frozen import FrozenConv2d, FrozenLinear
from crumb.engine.model.load import load_unet
from crumb.kernels.quantize import Int8Weight, NF4Weight
from crumb.profiles.base_model import inspect_base_model


def run(unet) -> torch.Tensor:
    config, generator = unet.config, torch.Generator().manual_seed(0)
    pooled_width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    pooled = torch.randn(1, pooled_width, generator=generator)
    with torch.no_grad():
        return unet(torch.randn(1, 4, 16, 16, generator=generator), torch.tensor([300]),
                    encoder_hidden_states=torch.randn(1, 77, config.cross_attention_dim, generator=generator),
                    added_cond_kwargs={"text_embeds": pooled, "time_ids": torch.tensor([[128.0, 128, 0, 0, 128, 128]])},
                    return_dict=False)[0]


@pytest.mark.parametrize(("quantise", "linear_kind", "limit"), [("int8", Int8Weight, 2e-2), ("nf4", NF4Weight, 5e-3)])
def test_a_quantised_unet_is_one_of_dequantised_weights(tiny_base, quantise, linear_kind, limit):
    """nf4 multiplies by the very weights (its convolutions are int8 weights, dequantised); int8 rounds activations as well."""
    base = inspect_base_model(tiny_base)
    quantised, plain = load_unet(base, torch.float32, quantise=quantise), load_unet(base, torch.float32)
    changed = 0
    for name, module in quantised.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, (Int8Weight, NF4Weight)):
            changed += 1
            assert isinstance(weight, linear_kind if isinstance(module, FrozenLinear) else Int8Weight), name
            plain.get_submodule(name).weight.data = weight.dequantised(torch.float32)
    blocks = [name for name, module in plain.named_modules()
              if isinstance(module, (nn.Linear, nn.Conv2d)) and name.split(".")[0] in ("down_blocks", "mid_block", "up_blocks")
              and "time_emb_proj" not in name]
    assert changed == len(blocks)
    expected, found = run(plain), run(quantised)
    difference = ((found - expected).norm() / expected.norm()).item()
    assert difference < limit, f"{difference:.1e}"
    exact = run(load_unet(base, torch.float32))
    assert ((expected - exact).norm() / exact.norm()).item() > 1e-3, "quantising changed nothing"


def test_frozen_layers_keep_nothing(tiny_base):
    unet = load_unet(inspect_base_model(tiny_base), torch.float32)
    kept = []
    convolution = next(module for module in unet.modules() if isinstance(module, FrozenConv2d))
    linear = next(module for module in unet.modules() if isinstance(module, FrozenLinear))
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        convolution(torch.randn(1, convolution.in_channels, 8, 8, requires_grad=True))
        linear(torch.randn(3, linear.in_features, requires_grad=True))
    assert not kept
