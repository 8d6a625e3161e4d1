"""The lean blocks: what they compute is what diffusers' own compute, and they keep what they promise to keep."""

from functools import partial

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from crumb.engine.memory.recompute import placeable_blocks, recompute_blocks
from crumb.engine.model.frozen import freeze_layers
from crumb.engine.model.lean import make_lean
from crumb.engine.model.load import load_unet
from crumb.engine.network import lora
from crumb.engine.network.lora import attach_lora
from crumb.profiles.base_model import inspect_base_model

CPU = torch.device("cpu")
MIB = 2**20


def trainable_unet(unet, plan, lean: bool, int8_activations: bool = False):
    if lean:
        freeze_layers(unet)
    network = attach_lora(unet, plan)
    if lean:
        make_lean(unet, int8_activations)
    return unet, network


def call(unet, size: tuple[int, int], dtype: torch.dtype, memory_format=torch.contiguous_format):
    config, generator = unet.config, torch.Generator().manual_seed(0)
    pooled_width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    latents, text, pooled = (torch.randn(*shape, generator=generator, dtype=dtype) for shape in (
        (2, 4, *size), (2, 77, config.cross_attention_dim), (2, pooled_width)))
    return unet(latents.to(memory_format=memory_format), torch.tensor([100, 700]), encoder_hidden_states=text,
                added_cond_kwargs={"text_embeds": pooled, "time_ids": torch.tensor([[128.0, 96, 0, 8, 128, 96]] * 2)},
                return_dict=False)[0]


@pytest.mark.parametrize(("settings", "int8_activations", "limit"), [
    ({"targets": "attention"}, False, 1e-5), ({"targets": "attention+ff"}, False, 1e-5),
    ({"targets": "attention+ff+conv", "conv_rank": 4, "block_rates": {"MID": 0, "OUT03": 0}}, False, 1e-5),
    ({"targets": "attention+ff"}, True, 2e-2)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_diffusers_own_blocks(tiny_base, make_plan, settings, int8_activations, limit, memory_format,
                                                     checkpointing):
    plan, base, results = make_plan(rank=4, **settings), inspect_base_model(tiny_base), []
    for lean in (False, True):
        unet, network = trainable_unet(load_unet(base, torch.float32), plan, lean, int8_activations)
        generator = torch.Generator().manual_seed(1)
        for layer in network.layers.values():
            layer.lora_B.data.normal_(0, 0.1, generator=generator)
        if lean:
            unet.to(memory_format=memory_format)
        if lean and checkpointing:
            recompute_blocks(placeable_blocks(unet).values())
        sample = call(unet.train(), (16, 12), torch.float32, memory_format if lean else torch.contiguous_format)
        sample.square().mean().backward()
        results.append((sample.detach(), torch.cat([parameter.grad.flatten() for parameter in network.parameters()])))
    (sample, gradients), (lean_sample, lean_gradients) = results
    for name, found, expected, most in [("sample", lean_sample, sample, 1e-5), ("gradients", lean_gradients, gradients, limit)]:
        difference = ((found - expected).norm() / expected.norm()).item()
        assert difference < most, f"{name} differ by {difference:.1e}"


def by_definition(layer, x):
    """A LoRA layer with dropout in plain torch: what else draws the same numbers must compute the same."""
    base, rates = layer.base(x), layer.dropout
    if rates.module and torch.rand(()).item() < rates.module:
        return base
    product = F.linear if x.dim() < 4 else F.conv2d
    options = {} if x.dim() < 4 else {"stride": layer.base.stride, "padding": layer.base.padding}
    down = F.dropout(product(x, layer.lora_A.to(x.dtype), **options), rates.network)
    if rates.rank:
        kept = torch.rand(len(down), layer.rank) >= rates.rank
        ranks = {2: (len(down), layer.rank), 3: (len(down), 1, layer.rank), 4: (len(down), layer.rank, 1, 1)}[down.dim()]
        down = down * kept.view(ranks) / (1 - rates.rank)
    return base + product(down, layer.lora_B.to(x.dtype)) * layer.scaling


@pytest.mark.parametrize("rates", [{"network_dropout": 0.3}, {"rank_dropout": 0.3}, {"module_dropout": 0.4},
                                   {"network_dropout": 0.2, "rank_dropout": 0.1, "module_dropout": 0.1}])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_under_dropout_the_same_is_left_out(tiny_base, make_plan, rates, memory_format, checkpointing):
    """Recomputation too must draw what was drawn before."""
    plan, base = make_plan(rank=4, targets="attention+ff+conv", conv_rank=3, **rates), inspect_base_model(tiny_base)
    results = []
    for lean in (False, True):
        # Dropout draws in the order of memory, so the reference must have its values in plain order.
        unet, network = trainable_unet(load_unet(base, torch.float64).to(memory_format=torch.contiguous_format), plan, lean)
        generator = torch.Generator().manual_seed(1)
        for layer in network.layers.values():
            layer.double().lora_B.data.normal_(0, 0.1, generator=generator)
            if not lean:
                layer.forward = partial(by_definition, layer)
        if lean:
            unet.to(memory_format=memory_format)
        if lean and checkpointing:
            recompute_blocks(placeable_blocks(unet).values())
        unet.train()
        network.train(True)
        torch.manual_seed(5)
        sample = call(unet, (16, 12), torch.float64, memory_format if lean else torch.contiguous_format)
        sample.square().mean().backward()
        results.append((sample.detach(), [parameter.grad for parameter in network.parameters()], torch.rand(())))
    (sample, gradients, drawn), (lean_sample, lean_gradients, lean_drawn) = results
    torch.testing.assert_close(lean_sample, sample, rtol=0, atol=1e-6 * sample.abs().max().item())
    assert drawn == lean_drawn
    largest = max(expected.norm() for expected in gradients if expected is not None)
    for expected, found in zip(gradients, lean_gradients):
        assert (found is None) == (expected is None), "a module left out has no gradient"
        if expected is not None:
            assert (found - expected).norm() <= 1e-6 * expected.norm() + 1e-12 * largest
    assert any(expected is None for expected in gradients) == ("module_dropout" in rates)


@pytest.fixture(scope="module")
def kept_bytes(make_plan):
    """What each block of SDXL's own U-Net keeps for backward, at 1024x1024, one picture, 16 bits, rank 16; nothing is
    computed, so this takes seconds."""
    def count(int8_activations: bool, **settings) -> dict[str, float]:
        config = dict(
            sample_size=128, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), block_out_channels=(320, 640, 1280),
            transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20), cross_attention_dim=2048,
            addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
            use_linear_projection=True)
        kept, part = {}, ["other"]
        patch = pytest.MonkeyPatch()
        patch.setattr(lora, "_initialise", lambda *_: None)  # there are no values
        torch.set_default_dtype(torch.bfloat16)
        try:
            with FakeTensorMode(allow_non_fake_inputs=True):
                unet = UNet2DConditionModel(**config).requires_grad_(False)
                unet, network = trainable_unet(unet, make_plan(**{"rank": 16} | settings), True, int8_activations)
                network.train(True)
                weights = {tensor.untyped_storage()._cdata for tensor in (*unet.parameters(), *network.parameters())}
                for name in ("down_blocks.0", "down_blocks.1", "up_blocks.2"):
                    unet.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: part.append(name))
                    unet.get_submodule(name).register_forward_hook(lambda *_: part.append("other"))

                def keep(tensor):
                    storage = tensor.untyped_storage()
                    if storage._cdata not in weights:
                        kept.setdefault(storage._cdata, (part[-1], storage))
                    return tensor

                with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                    unet(torch.randn(1, 4, 128, 128).to(memory_format=torch.channels_last), torch.tensor([500]),
                         encoder_hidden_states=torch.randn(1, 77, 2048), return_dict=False,
                         added_cond_kwargs={"text_embeds": torch.randn(1, 1280), "time_ids": torch.randn(1, 6)})
        finally:
            torch.set_default_dtype(torch.float32)
            patch.undo()
        sums = {"all": sum(storage.nbytes() for _, storage in kept.values()) / MIB}
        for place in ("down_blocks.0", "down_blocks.1", "up_blocks.2"):
            sums[place] = sum(storage.nbytes() for where, storage in kept.values() if where == place) / MIB
        return sums
    return count


def test_what_the_full_size_unet_keeps_for_backward(kept_bytes):
    """diffusers + PEFT keep 6,438 MiB all in 16 bits, 8,081 under autocast (counted the same way)."""
    plain, int8 = kept_bytes(False), kept_bytes(True)
    assert plain["all"] < 3800 and int8["all"] < 3030, (plain, int8)
    assert 700 < plain["all"] - int8["all"] < 800


def test_dropout_keeps_a_byte_for_each_value_it_may_leave_out(kept_bytes):
    """x Aᵀ itself takes two; whole ranks take next to nothing."""
    added = {name: kept_bytes(False, **{name: 0.1})["all"] - kept_bytes(False)["all"]
             for name in ("network_dropout", "rank_dropout")}
    assert 10 < added["network_dropout"] < 15 and 0 < added["rank_dropout"] < 0.1, added
    in_int8 = kept_bytes(True, network_dropout=0.1)["all"] - kept_bytes(True)["all"]
    assert in_int8 == pytest.approx(added["network_dropout"])
    high = kept_bytes(False, rank=128, network_dropout=0.1)["all"] - kept_bytes(False, rank=128)["all"]
    assert high == pytest.approx(8 * added["network_dropout"], rel=0.01)


def test_blocks_with_nothing_to_learn_before_them_keep_nothing(kept_bytes):
    kept = kept_bytes(False, block_rates={block: 0 for block in ("IN04", "IN05", "IN07", "IN08", "MID")})
    assert kept["down_blocks.0"] == kept["down_blocks.1"] == 0 < kept["up_blocks.2"], kept
    assert kept_bytes(False)["down_blocks.0"] == 0
