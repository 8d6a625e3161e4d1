"""The flat buffer: weights and gradients are views of it, whatever autograd, the engine and torch do with them."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from crumb.engine.network.lora import LoRALinear, Network
from crumb.engine.network.save import write_safetensors
from crumb.engine.train.checkpoint import pack_optimizer, restore, unpack_optimizer
from crumb.kernels.adamw_8bit import AdamW8bit
from crumb.kernels.prodigy_8bit import Prodigy8bit

SHAPES = [(16, 40), (40, 16), (7,), (3, 5, 3, 3), (300,)]
BOTH = pytest.mark.parametrize("make", [AdamW8bit, Prodigy8bit])


def make_parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def set_gradients(parameters, seed, without=()):
    generator = torch.Generator().manual_seed(seed)
    for index, parameter in enumerate(parameters):
        gradient = 0.01 * torch.randn(parameter.shape, generator=generator)
        parameter.grad = None if index in without else gradient


def values(parameters):
    return [parameter.detach().clone() for parameter in parameters]


def assert_equal(first, second):
    for one, other in zip(first, second, strict=True):
        assert one.equal(other)


@BOTH
def test_weights_and_gradients_are_views_of_flat_buffers(make):
    parameters = make_parameters()
    before = values(parameters)
    optimizer = make(parameters)
    assert_equal(parameters, before)
    for _ in range(2):
        (2 * sum(parameter.sum() for parameter in parameters)).backward()
    for flat, views in ((optimizer.masters, parameters), (optimizer.gradients, [p.grad for p in parameters])):
        inside = [view.data_ptr() - flat.data_ptr() for view in views]
        assert all(offset % 1024 == 0 and 0 <= offset < flat.nbytes for offset in inside) and inside == sorted(inside)
    assert all((parameter.grad == 4).all() for parameter in parameters)
    assert optimizer.gradients.sum() == 4 * sum(parameter.numel() for parameter in parameters)


@BOTH
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_zeroes_the_buffer_and_autograd_comes_back_to_it(make, set_to_none):
    parameters = make_parameters()
    optimizer = make(parameters)
    sum(parameter.sum() for parameter in parameters).backward()
    for _ in range(3):
        optimizer.zero_grad(set_to_none)
        assert not optimizer.gradients.any()
        assert all((parameter.grad is None) == set_to_none for parameter in parameters)
        sum(parameter.sum() for parameter in parameters[:3]).backward()
        assert all((parameter.grad == 1).all() for parameter in parameters[:3])
        assert optimizer.gradients.sum() == sum(parameter.numel() for parameter in parameters[:3])


@BOTH
@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_set_to_none_by_others_do_not_come_back(make, set_to_none):
    """nn.Module.zero_grad does that, and knows nothing of the buffer."""
    parameters = make_parameters()
    optimizer = make(parameters)
    sum(parameter.sum() for parameter in parameters).backward()
    optimizer.zero_grad(set_to_none)
    sum(parameter.sum() for parameter in parameters).backward()
    for parameter in parameters:
        parameter.grad = None
    parameters[0].sum().backward()
    assert (parameters[0].grad == 1).all()
    assert optimizer.clip_gradients(1.0) == pytest.approx(parameters[0].numel()**0.5)


@BOTH
def test_gradients_from_elsewhere_count_as_those_in_the_buffer(make):
    first, second = make_parameters(), make_parameters()
    optimizers = make(first), make(second)
    for step in range(3):
        set_gradients(first, step)
        for parameter in second:
            parameter.grad = None
        sum((parameter * one.grad).sum() for parameter, one in zip(second, first)).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert_equal(first, second)


@BOTH
@pytest.mark.parametrize(("dtype", "way"), [(torch.bfloat16, "plain"), (torch.float16, "plain"), (torch.float16, "triton")])
def test_gradients_in_16_bits(make, dtype, way, monkeypatch):
    """They are those of fp32 weights, rounded as they come. (Triton's interpreter is wrong in bfloat16.)"""
    if way == "triton":
        pytest.importorskip("triton")
    monkeypatch.setenv("CRUMB_KERNELS", way)
    parameters, rounded = make_parameters(), make_parameters()
    optimizer, other = make(parameters, gradient_dtype=dtype), make(rounded)
    for step in range(3):
        set_gradients(rounded, step)
        sum((parameter * one.grad).sum() for parameter, one in zip(parameters, rounded)).backward()
        for parameter, one in zip(parameters, rounded):
            assert parameter.grad.dtype == dtype and parameter.grad.equal(one.grad.to(dtype))
            one.grad = one.grad.to(dtype).float()
        for one in (optimizer, other):
            one.clip_gradients(0.1)
            one.step()
            one.zero_grad()
    torch.testing.assert_close(parameters, rounded, rtol=1e-6, atol=1e-7)


@BOTH
def test_tensors_without_a_gradient_rest(make):
    parameters = make_parameters()
    optimizer = make(parameters, weight_decay=0.1)
    for step, without in enumerate([(), (1, 3), (1, 3)]):
        set_gradients(parameters, step, without)
        before, states = values(parameters), [state.clone() for state in optimizer.states().values()]
        optimizer.step()
        moved = {index for index, (old, new) in enumerate(zip(before, parameters)) if not old.equal(new)}
        assert moved == set(range(len(SHAPES))) - set(without)
        for old, new in zip(states[:2], optimizer.states().values()):
            for index in without:
                blocks = slice(optimizer.first_blocks[index], optimizer.first_blocks[index + 1])
                assert old[blocks].equal(new[blocks])
    before = values(parameters)
    set_gradients(parameters, 9, without=range(len(SHAPES)))
    optimizer.step()
    assert_equal(parameters, before)


@BOTH
def test_the_norm_is_torchs_and_clipping_acts_once(make):
    parameters, clipped = make_parameters(), make_parameters()
    optimizer, other = make(parameters), make(clipped)
    for max_norm in (0.01, 100.0, float("inf")):
        set_gradients(parameters, 1)
        set_gradients(clipped, 1)
        norm = nn.utils.clip_grad_norm_(clipped, max_norm)
        torch.testing.assert_close(optimizer.clip_gradients(max_norm), norm, rtol=1e-6, atol=0)
        optimizer.step()
        other.step()
        torch.testing.assert_close(parameters, clipped, rtol=1e-5, atol=1e-7)
    assert optimizer._factor is optimizer._one


@BOTH
@pytest.mark.parametrize("how", ["norm", "flag"])
def test_a_skipped_step_changes_nothing(make, how):
    parameters = make_parameters()
    optimizer = make(parameters)
    set_gradients(parameters, 0)
    optimizer.step()
    assert not optimizer.skipped
    before = values(parameters), [state.clone() for state in optimizer.states().values()]
    set_gradients(parameters, 1)
    parameters[2].grad[3] = float("nan")
    if how == "norm":
        assert not optimizer.clip_gradients(1.0).isfinite()
        optimizer.step()
    else:
        optimizer.step(skip=~torch.tensor(float("inf")).isfinite())
    assert optimizer.skipped
    assert_equal(parameters, before[0])
    assert_equal(optimizer.states().values(), before[1])
    optimizer.zero_grad()
    set_gradients(parameters, 2)
    optimizer.clip_gradients(1.0)
    optimizer.step()
    assert not optimizer.skipped and all(state.isfinite().all() for state in optimizer.states().values())


@BOTH
@pytest.mark.parametrize("unscale_first", [True, False])
def test_under_a_grad_scaler(make, unscale_first):
    """Scaled by a power of two, so that every gradient comes back bit by bit."""
    parameters, plain = make_parameters(), make_parameters()
    optimizer, other = make(parameters), make(plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        for members, of, scale in ((parameters, optimizer, scaler.scale), (plain, other, lambda loss: loss)):
            of.zero_grad()
            loss = sum((0.01 * (step + 1) * parameter**2).sum() for parameter in members)
            scale(loss * float("inf") if step == 2 else loss).backward()
        if unscale_first:
            scaler.unscale_(optimizer)
            optimizer.clip_gradients(float("inf"))
        scaler.step(optimizer)
        scaler.update()
        if step != 2:
            other.step()
        assert bool(optimizer.skipped) == (step == 2)
        assert_equal(parameters, plain)
    assert scaler.get_scale() == 512.0 and not hasattr(optimizer, "found_inf")


@BOTH
@pytest.mark.parametrize("bits", [8, 32])
def test_a_checkpoint_goes_on_bit_by_bit(make, bits, tmp_path):
    def run(optimizer, parameters, steps):
        for step in steps:
            set_gradients(parameters, step, without=(step % 5,))
            optimizer.clip_gradients(0.2)
            optimizer.step()

    parameters = make_parameters()
    optimizer = make([{"params": parameters[:2]}, {"params": parameters[2:]}], bits=bits)
    run(optimizer, parameters, range(5))
    tensors, plain = pack_optimizer(optimizer)
    write_safetensors(tmp_path / "state.safetensors", tensors, {})
    resumed = [nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    run(optimizer, parameters, range(5, 10))

    fresh = make([{"params": resumed[:2]}, {"params": resumed[2:]}], bits=bits)
    unpack_optimizer(fresh, load_file(tmp_path / "state.safetensors"), plain)
    run(fresh, resumed, range(5, 10))
    assert_equal(resumed, parameters)
    assert_equal(fresh.states().values(), optimizer.states().values())
    assert fresh.param_groups[0]["betas"] == optimizer.param_groups[0]["betas"]


@BOTH
def test_a_state_of_other_weights_is_refused(make):
    state = copy.deepcopy(make(make_parameters()).state_dict())
    for other in (make(make_parameters()[:3]), make(make_parameters(), bits=32)):
        with pytest.raises(ValueError, match="no state of"):
            other.load_state_dict(state)


@BOTH
def test_loras_are_restored_into_the_buffer(make):
    """checkpoint.restore copies in place, so the layers still train what the optimizer moves."""
    torch.manual_seed(0)
    network = Network({"one": LoRALinear(nn.Linear(20, 30), 4, 4.0), "two": LoRALinear(nn.Linear(30, 20), 4, 4.0)})
    optimizer = make(network.parameters())
    saved = {f"{stem}.{name}": torch.randn_like(getattr(layer, name))
             for stem, layer in network.layers.items() for name in ("lora_A", "lora_B")}
    tensors, plain = pack_optimizer(optimizer)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    restore({"optimizer": plain, "scaler": {}}, saved | tensors, network, optimizer, scaler)
    assert_equal(network.parameters(), saved.values())
    assert optimizer.masters.sum() == pytest.approx(sum(value.sum().item() for value in saved.values()), abs=1e-3)
    network.layers["two"](network.layers["one"](torch.randn(5, 20))).sum().backward()
    optimizer.step()
    assert not any(parameter.equal(value) for parameter, value in zip(network.parameters(), saved.values()))


@pytest.mark.parametrize(("make", "limit"), [(AdamW8bit, 2.1), (Prodigy8bit, 2.5)])
def test_bytes_a_weight(make, limit):
    optimizer = make([nn.Parameter(torch.zeros(16, 640)), nn.Parameter(torch.zeros(640, 16))])
    assert optimizer.num_state_bytes / (2 * 16 * 640) <= limit


@BOTH
def test_what_it_does_not_take(make):
    with pytest.raises(ValueError, match="float32"):
        make([nn.Parameter(torch.zeros(4, dtype=torch.float16))])
    with pytest.raises(ValueError, match="betas"):
        make([nn.Parameter(torch.zeros(4))], betas=(0.9, 1.0))
    with pytest.raises(ValueError, match="at its start"):
        make([nn.Parameter(torch.zeros(4))]).add_param_group({"params": [nn.Parameter(torch.zeros(4))]})
    layer = nn.Linear(4, 4)
    optimizer = make(layer.parameters())
    layer.to(torch.float64).to(torch.float32)
    with pytest.raises(RuntimeError, match="moved"):
        optimizer.step()
