"""Streamed blocks: the same results bit for bit, the right weights at every use, and no more copies than needed."""

import pytest
import torch
from torch import nn

from crumb.engine.memory import stream as stream_module
from crumb.engine.memory.stream import stream_blocks
from crumb.kernels import conv, linear, norm_conv
from crumb.kernels.lora_linear import Products

SETTINGS = {
    "16 bit": {}, "as diffusers wrote it": {"lean": False}, "int8": {"quantise": "int8"}, "nf4": {"quantise": "nf4"},
    "dropout": {"network_dropout": 0.2, "rank_dropout": 0.2, "module_dropout": 0.2},
    "text": {"text_encoder_learning_rate": 1e-3, "text_encoder_2_learning_rate": 1e-3},
    "text, int8 convolutions": {"text_encoder_learning_rate": 1e-3, "text_encoder_2_learning_rate": 1e-3, "quantise": "int8",
                                "targets": "attention+ff+conv", "conv_rank": 2},
    "accumulation": {"gradient_accumulation_steps": 3, "batch_size": 1},
    "late blocks": {"block_rates": {block: 0 for block in ("IN04", "IN05", "IN07", "IN08", "MID")}}}
FROM_THE_FIRST = {"targets": "attention+ff+conv", "conv_rank": 2}
"""The first block learns too, so that backward goes through all."""

NUM_BLOCKS = 34


def every(_number: int) -> bool:
    return True


def none(_number: int) -> bool:
    return False


@pytest.fixture
def guarded(monkeypatch):
    """Has every use of a streamed layer's weight, in forward and backward, find that block's weights in the slot."""
    products_of, dense = linear.products_of, conv.dense

    def guard(arrangement) -> list[int]:
        ring, uses = arrangement.ring, []
        owner = {id(module.weight): (number, module.weight) for number, block in enumerate(arrangement.streamed.values())
                 for module in block.modules() if hasattr(module, "weight")}

        def check(weight):
            number, same = owner.get(id(weight), (None, None))
            if same is weight:
                uses.append(number)
                assert ring.owners[number % len(ring.owners)] == number
                packed = ring.blocks[number]
                assert packed.place.is_cuda or torch.equal(packed.place, packed.host), "other bytes than the host's"

        def checked(weight):
            products = products_of(weight)
            return Products(lambda rows, weight, *rest: (check(weight), products.forward(rows, weight, *rest))[1],
                            lambda dy, rows, down, weight, *rest: (check(weight), products.backward(
                                dy, rows, down, weight, *rest))[1])

        monkeypatch.setattr(linear, "products_of", checked)
        for module in (conv, norm_conv):
            monkeypatch.setattr(module, "dense", lambda weight, like: (check(weight), dense(weight, like))[1])
        return uses
    return guard


@pytest.mark.parametrize("name", SETTINGS)
def test_results_are_the_same_bit_for_bit(arranged, steps, assert_same, guarded, name):
    settings = SETTINGS[name]
    expected = steps(arranged(**settings))
    for what, placed in {
            "kept": {"stream": every, "recompute": none},
            "recomputed": {"stream": every, "recompute": every, "depth": 2},
            "mixed": {"stream": lambda number: number % 3 > 0, "recompute": lambda number: number % 4 > 1},
            "few": {"stream": lambda number: number in (2, 9, 30), "recompute": lambda number: number < 20, "depth": 2},
    }.items():
        arrangement = arranged(**placed, **settings)
        uses = guarded(arrangement)
        assert_same(steps(arrangement), expected, f"{name}, streamed and {what}")
        # What diffusers wrote multiplies by torch's own functions where there is no LoRA, unseen.
        assert set(uses) == set(range(len(arrangement.streamed))) or (settings.get("lean") is False and uses)


def loss_of(arrangement, seed: int = 0) -> torch.Tensor:
    device = arrangement.trainer.placement.device
    draw = torch.Generator().manual_seed(seed)
    latents, text, pooled = (torch.randn(*shape, generator=draw).to(device) for shape in (
        (1, 4, 16, 16), (1, 77, 128), (1, 64)))
    sample = arrangement.trainer.unet(latents, torch.tensor([300], device=device), encoder_hidden_states=text,
                                      added_cond_kwargs={"text_embeds": pooled, "time_ids": torch.ones(1, 6, device=device)},
                                      return_dict=False)[0]
    return sample.square().mean()


@pytest.mark.parametrize(("recompute", "depth"), [(every, 2), (none, 3), (every, 3), (none, 5), (every, NUM_BLOCKS)])
def test_passes_in_any_order(arranged, guarded, recompute, depth):
    """Without gradients, never gone back through, two at a time, gone back through late."""
    results = []
    for stream in (none, every):
        arrangement = arranged(stream=stream, recompute=recompute, depth=depth, **FROM_THE_FIRST)
        parameters = arrangement.trainer.network.parameters()
        if arrangement.ring:
            guarded(arrangement)
        found = []
        with torch.no_grad():
            found.append(loss_of(arrangement))
        first, unused, second = (loss_of(arrangement, seed) for seed in (1, 2, 3))
        with torch.no_grad():
            found.append(loss_of(arrangement, 4))
        found += [first.detach(), unused.detach(), *torch.autograd.grad(first, parameters)]
        del unused
        found += torch.autograd.grad(second + loss_of(arrangement, 5), parameters)
        with torch.inference_mode():
            found.append(loss_of(arrangement, 6))
        found += torch.autograd.grad(loss_of(arrangement, 7), parameters)
        results.append(found)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("recompute", [none, every])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_step_after_one_that_broke_off(arranged, steps, assert_same, guarded, recompute, where):
    expected = steps(arranged())
    for number in (3, 15, 33):
        arrangement = arranged(stream=every, recompute=recompute)
        guarded(arrangement)
        block = list(arrangement.blocks.values())[number]

        def fail(*_):
            raise torch.OutOfMemoryError("made up")

        hook = block.register_forward_hook(
            lambda _, __, out: fail() if where == "forward" else (out.register_hook(fail), None)[1])
        with pytest.raises(torch.OutOfMemoryError):
            steps(arrangement, 1)
        hook.remove()
        arrangement.trainer.optimizer._optimizer_step_pre_hooks.clear()
        arrangement.trainer.optimizer.zero_grad()
        assert_same(steps(arrangement), expected, f"after a failure in {where} at {number}")


def test_a_failed_copy_leaves_nobody_in_the_slot(device, monkeypatch):
    blocks = [nn.Linear(2, 2).requires_grad_(False) for _ in range(4)]
    expected = blocks[0].weight.clone()
    ring = stream_blocks(dict(zip("abcd", blocks)), device)

    def fail(place, *_):
        place.fill_(255)
        raise RuntimeError("made up")

    ring.acquire(0)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="made up"):
        patch.setattr(ring.lane, "copy", fail)
        ring.acquire(1)  # sends for d, which would go where a is
    ring.acquire(0)
    assert torch.equal(blocks[0].weight.cpu(), expected)


@pytest.mark.parametrize(("recompute", "depth"), [(none, 2), (every, 3), (none, 7), (every, NUM_BLOCKS), (none, 50)])
def test_copies_of_a_step(arranged, steps, recompute, depth):
    """Every block once each way, save those that the turn at either end finds in their slots."""
    arrangement = arranged(stream=every, recompute=recompute, depth=depth, **FROM_THE_FIRST)
    ring, slots, found = arrangement.ring, min(depth, NUM_BLOCKS), []
    steps(arrangement, 3, between=lambda: found.append(ring.take_statistics()))
    saved = NUM_BLOCKS - slots
    assert [statistics.num_loads for statistics in found] == [NUM_BLOCKS + saved, 2 * saved, 2 * saved]
    sizes = [len(packed.host) for packed in ring.blocks]
    once_each_way = 2 * sum(sizes) - sum(sizes[:slots]) - sum(sizes[NUM_BLOCKS - slots:])
    assert [statistics.copied_bytes for statistics in found[1:]] == [once_each_way] * 2
    on_host = ring.blocks[0].place.device.type == "cpu"  # elsewhere a copy may well be there in time
    assert not on_host or all((statistics.wait_s > 0) == (statistics.num_loads > 0) for statistics in found)


def test_only_blocks_that_are_gone_back_through_are_fetched_again(arranged, steps):
    arrangement = arranged(stream=every, **SETTINGS["late blocks"])
    steps(arrangement, 1)
    arrangement.ring.take_statistics()
    steps(arrangement, 1)
    first = arrangement.ring.first_to_learn
    assert 16 <= first < NUM_BLOCKS
    assert arrangement.ring.take_statistics().num_loads <= NUM_BLOCKS + NUM_BLOCKS - first - 3 + 2


@pytest.mark.parametrize("quantise", ["no", "int8", "nf4"])
def test_tensors_keep_shape_strides_and_version(arranged, steps, quantise):
    settings = {"quantise": quantise, **FROM_THE_FIRST}

    def described(arrangement):
        return [(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device) for block in arrangement.blocks.values()
                for tensor, _ in stream_module._frozen(block)]

    arrangement = arranged(stream=every, **settings)
    tensors = [tensor for block in arrangement.blocks.values() for tensor, _ in stream_module._frozen(block)]
    assert described(arrangement) == described(arranged(**settings))
    assert all(tensor.data_ptr() % (64 if tensor.device.type == "cpu" else 256) == 0 for tensor in tensors)
    versions = [tensor._version for tensor in tensors]
    steps(arrangement, 1)
    assert versions == [tensor._version for tensor in tensors]
    slots = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    assert len(slots) == 3


def test_what_learns_stays_on_the_device_and_is_the_same_parameter(device):
    block = nn.Linear(3, 3)
    block.bias.requires_grad_(False)
    weight, bias = block.weight, block.bias.detach().clone()
    ring = stream_blocks({"a": block}, device)
    assert block.weight is weight and weight.device.type == device.type and weight.requires_grad
    assert len(ring.blocks[0].host) == 12
    assert torch.equal(block(torch.zeros(1, 3, device=device))[0].cpu(), bias)


def test_requests_that_make_no_sense():
    block, cpu = nn.Linear(2, 2).requires_grad_(False), torch.device("cpu")
    with pytest.raises(ValueError, match="depth is 1"):
        stream_blocks({"a": block}, cpu, depth=1)
    with pytest.raises(ValueError, match="a and b share weights"):
        stream_blocks({"a": block, "b": nn.Sequential(block)}, cpu)
    assert not stream_blocks({}, cpu).blocks
