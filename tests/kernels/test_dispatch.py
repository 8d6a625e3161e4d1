"""Which way is chosen for cards that are not here, and which launch configuration."""

import json

import pytest
import torch

from crumb.kernels import dispatch
from crumb.kernels.dispatch import OPERATIONS, way
from crumb.kernels.launch import CONFIGS, launch_for

GPU = torch.device("cuda", 0)
FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


@pytest.fixture
def card(monkeypatch):
    """A GPU of a compute capability, with Triton, for all that asks."""
    def put(*capability):
        dispatch._way.cache_clear()
        monkeypatch.delenv("CRUMB_KERNELS", raising=False)
        monkeypatch.setattr(dispatch, "triton", object())
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    yield put
    dispatch._way.cache_clear()


@pytest.mark.parametrize(("capability", "operation", "dtype", "triton", "why"), [
    ((6, 1), "geglu", FP16, False, "older than RTX 20"), ((7, 5), "geglu", FP16, True, "7.5"),
    ((7, 5), "lora_linear_int8", FP16, False, "no tensor cores"), ((8, 6), "lora_linear_int8", FP16, True, "8.6"),
    ((8, 6), "lora_linear_int8", FP32, False, "float32"), ((12, 0), "lora_linear_int8", BF16, True, "12.0"),
    ((8, 9), "layer_norm", FP64, False, "float64"), ((8, 9), "adamw_8bit", FP32, True, "8.9")])
def test_the_card_and_the_number_format_decide(card, capability, operation, dtype, triton, why):
    card(*capability)
    found = way(operation, GPU, dtype)
    assert found.triton == triton and why in found.why


def test_what_else_decides(card, monkeypatch):
    card(8, 6)
    assert not way("geglu", torch.device("cpu"), FP16).triton
    monkeypatch.setenv("CRUMB_KERNELS", "plain")
    assert way("geglu", GPU, FP16).why == "CRUMB_KERNELS=plain"
    monkeypatch.setenv("CRUMB_KERNELS", "triton")
    assert way("geglu", torch.device("cpu"), FP16).triton
    monkeypatch.setattr(dispatch, "triton", None)
    dispatch._way.cache_clear()
    assert way("geglu", GPU, FP16).why == "Triton is not installed"


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (9, 0), (12, 0)])
def test_all_ways_of_a_card_as_json(card, monkeypatch, capsys, capability):
    """What `crumb doctor` reads."""
    card(*capability)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert dispatch.main() == 0
    told = json.loads(capsys.readouterr().out)
    assert list(told) == list(OPERATIONS)
    without = {name for name, one in told.items() if not one["triton"]}
    assert without == ({"lora_linear_int8", "int8_transpose"} if capability < (8, 0) else set())


def test_a_launch_is_the_newest_that_is_not_newer_than_the_card():
    multiply = CONFIGS["int8_multiply"]
    for capability, entry in (((8, 0), 80), ((8, 9), 80), ((9, 0), 90), ((10, 0), 90), ((12, 0), 120), ((12, 1), 120)):
        assert launch_for("int8_multiply", capability) is multiply[entry]
    assert all(min(entries) in (75, 80) for entries in CONFIGS.values())
