"""fp16 convolutions are tried before a run that needs them, and mended or refused."""

import pytest
import torch

from crumb.engine.memory.placement import Placement
from crumb.engine.model import selftest
from crumb.engine.model.selftest import SHAPES, TOLERANCE, convolution_error, settle_convolutions
from crumb.profiles.errors import RequestError

HALF = Placement(torch.device("cuda"), torch.float16, True)


@pytest.fixture(autouse=True)
def cudnn(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce GTX 1660")


def card(monkeypatch, broken_unasked: float, broken_tried_out: float):
    """A card whose convolutions are wrong by so much, depending on how cuDNN picks its algorithm."""
    monkeypatch.setattr(selftest, "convolution_error", lambda device, dtype, channels, side: (
        (broken_tried_out if torch.backends.cudnn.benchmark else broken_unasked) if channels == 640 else 0.0))


def test_a_card_that_is_right_is_left_alone(monkeypatch):
    card(monkeypatch, 1e-3, float("inf"))
    settle_convolutions(HALF, pytest.fail)
    assert not torch.backends.cudnn.benchmark


def test_a_card_that_can_be_mended_is(monkeypatch):
    card(monkeypatch, float("inf"), 1e-3)
    told = []
    settle_convolutions(HALF, told.append)
    assert torch.backends.cudnn.benchmark and len(told) == 1 and "GTX 1660" in told[0]


def test_a_card_that_cant_be_is_refused_with_the_way_out(monkeypatch):
    card(monkeypatch, float("inf"), 0.5)
    with pytest.raises(RequestError, match='mixed_precision = "no"'):
        settle_convolutions(HALF, pytest.fail)


@pytest.mark.parametrize("placement", [Placement(torch.device("cpu"), torch.float16, True),
                                       Placement(torch.device("cuda"), torch.bfloat16, True)])
def test_nothing_is_tried_where_nothing_is_known_to_fail(monkeypatch, placement):
    monkeypatch.setattr(selftest, "convolution_error", lambda *_: pytest.fail("tried"))
    settle_convolutions(placement, pytest.fail)


def test_the_error_is_that_of_the_format():
    """fp16 keeps 11 bits; the exact computation has no error at all."""
    cpu = torch.device("cpu")
    assert convolution_error(cpu, torch.float32, 32, 16) < 1e-6
    assert 1e-5 < convolution_error(cpu, torch.float16, 32, 16) < TOLERANCE / 3


@pytest.mark.parametrize("wrong", ["nan", "zero"])
def test_wrong_results_are_seen(monkeypatch, wrong):
    right = torch.nn.functional.conv2d
    monkeypatch.setattr(selftest.F, "conv2d", lambda x, weight, **settings: right(x, weight, **settings) * (
        1 if x.dtype == torch.float32 else float("nan") if wrong == "nan" else 0))
    assert convolution_error(torch.device("cpu"), torch.float16, 32, 16) > TOLERANCE


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_this_gpu_is_right():
    for channels, side in SHAPES:
        assert convolution_error(torch.device("cuda"), torch.float16, channels, side) <= TOLERANCE
