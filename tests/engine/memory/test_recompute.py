"""Recomputed blocks: the same results bit for bit, and less kept, as much less as there are blocks of them."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D

from crumb.engine.memory import recompute as recompute_module
from crumb.engine.memory.recompute import placeable_blocks, recompute_blocks
from crumb.engine.model.tiny import SDXL, unet_config

SETTINGS = {
    "lean": {}, "as diffusers wrote it": {"lean": False}, "int8": {"quantise": "int8"}, "nf4": {"quantise": "nf4"},
    "dropout": {"network_dropout": 0.2, "rank_dropout": 0.2, "module_dropout": 0.2},
    "text": {"text_encoder_learning_rate": 1e-3, "text_encoder_2_learning_rate": 1e-3},
    "convolutions": {"targets": "attention+ff+conv", "conv_rank": 2}, "late blocks": {"block_rates": {"IN04": 0, "IN05": 0}}}


def every(_number: int) -> bool:
    return True


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
@pytest.mark.parametrize("lean", [True, False])
def test_blocks_come_in_the_order_of_a_forward_pass(arranged, steps, lean):
    arrangement, called = arranged(lean=lean), []
    for module in arrangement.trainer.unet.modules():
        if isinstance(module, BasicTransformerBlock | ResnetBlock2D):
            module.register_forward_pre_hook(lambda module, _: called.append(module))
    steps(arrangement, 1)
    assert called == list(arrangement.blocks.values())
    assert all(arrangement.trainer.unet.get_submodule(name) is block for name, block in arrangement.blocks.items())


def test_sdxls_own_blocks():
    with torch.device("meta"):
        blocks = list(placeable_blocks(UNet2DConditionModel(**unet_config(SDXL))).values())
    assert [sum(isinstance(block, kind) for block in blocks) for kind in (BasicTransformerBlock, ResnetBlock2D)] == [70, 17]


@pytest.mark.parametrize("name", SETTINGS)
def test_results_are_the_same_bit_for_bit(arranged, steps, assert_same, name):
    expected = steps(arranged(**SETTINGS[name]))
    for what, chosen in {"all": every, "every second": lambda number: number % 2 == 0}.items():
        assert_same(steps(arranged(recompute=chosen, **SETTINGS[name])), expected, f"{name}, {what} recomputed")


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
def test_the_state_of_the_generators_is_only_kept_for_dropout(arranged, steps, monkeypatch):
    kept, checkpoint = [], recompute_module.checkpoint
    monkeypatch.setattr(recompute_module, "checkpoint", lambda *args, **kwargs: (
        kept.append(kwargs["preserve_rng_state"]), checkpoint(*args, **kwargs))[1])
    steps(arranged(recompute=every), 1)
    assert set(kept) == {False}
    steps(arranged(recompute=every, network_dropout=0.1), 1)
    assert set(kept) == {False, True}


@pytest.fixture
def kept_bytes(arranged):
    """What a pass keeps for backward beside weights, by block."""
    def count(**settings) -> dict[str, int]:
        arrangement = arranged(**settings)
        unet, kept, part = arrangement.trainer.unet, {}, ["other"]
        weights = {tensor.untyped_storage().data_ptr() for tensor in unet.parameters()}
        for name, block in arrangement.blocks.items():
            block.register_forward_pre_hook(lambda *_, name=name: part.append(name))
            block.register_forward_hook(lambda *_: part.append("other"))

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept.setdefault(storage.data_ptr(), (part[-1], storage))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = unet(torch.ones(1, 4, 16, 16).to(memory_format=torch.channels_last), torch.tensor([500]),
                        encoder_hidden_states=torch.ones(1, 77, 128), return_dict=False,
                        added_cond_kwargs={"text_embeds": torch.ones(1, 64), "time_ids": torch.ones(1, 6)})[0].sum()
        assert loss.requires_grad
        sums = dict.fromkeys(["other", *arrangement.blocks], 0)
        for where, storage in kept.values():
            sums[where] += storage.nbytes()
        return sums
    return count


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
def test_less_is_kept_the_more_blocks_are_recomputed(kept_bytes):
    totals = [sum(kept_bytes(recompute=lambda number, most=most: number < most).values()) for most in (0, 6, 12, 20, 27, 34)]
    assert totals == sorted(totals, reverse=True) and len(set(totals)) == len(totals), totals
    assert totals[-1] < 0.4 * totals[0], totals


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
def test_blocks_with_nothing_to_learn_before_them_keep_nothing(kept_bytes):
    kept = kept_bytes(recompute=every, block_rates={block: 0 for block in ("IN04", "IN05", "IN07", "IN08", "MID")})
    down = {name: num for name, num in kept.items() if name.startswith(("down_blocks", "mid_block"))}
    assert len(down) == 16 and not any(down.values()), down
    assert any(kept.values())


def test_a_pass_without_gradients_computes_once():
    block = torch.nn.Linear(2, 2)
    called, forward = [], block.forward
    block.forward = lambda x: (called.append(torch.is_grad_enabled()), forward(x))[1]
    recompute_blocks([block])
    with torch.no_grad():
        assert not block(torch.ones(1, 2)).requires_grad
    assert called == [False]
    block(torch.ones(1, 2)).sum().backward()
    assert called == [False, True, True] and block.weight.grad is not None
