"""Int8Weight and NF4Weight: their errors, their sizes, and NF4 against bitsandbytes."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from crumb.kernels.quantize import NF4_CODES, PIECE, Int8Weight, NF4Weight, weight_buffer


def make(*shape, seed=0, dtype=torch.float32):
    """Rows differ in size by a few times, and a few are far larger, as in trained weights."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(shape[0], *[1] * (len(shape) - 1), generator=generator).mul(0.4).exp()
    spread[:: max(1, shape[0] // 3)] *= 4
    return (torch.randn(*shape, generator=generator) * spread).to(dtype)


def error(found, weight):
    return ((found.double() - weight.double()).norm() / weight.double().norm()).item()


@pytest.mark.parametrize("shape", [(7, 5), (640, 640), (300, 1280), (32, 24, 3, 3)])
def test_int8_is_off_by_half_a_step_at_most(shape):
    weight = make(*shape)
    kept = Int8Weight.of(weight)
    assert kept.values.dtype == torch.int8 and kept.shape == shape
    largest = weight.flatten(1).abs().amax(1).view(-1, *[1] * (weight.dim() - 1))
    assert ((kept.dequantised(torch.float32) - weight).abs() <= largest / 127 * 0.50001).all()
    assert kept.num_bytes == weight.numel() + 4 * shape[0]


def test_a_row_is_kept_as_well_beside_rows_far_larger():
    weight = make(256, 1280)
    by_row, by_matrix = Int8Weight.of(weight), Int8Weight.of(weight.view(1, -1))
    assert error(by_row.dequantised(torch.float32), weight) < 0.01
    assert error(by_matrix.dequantised(torch.float32).view_as(weight), weight) > 0.025


def test_codes_are_the_quantiles_of_the_normal_distribution():
    """QLoRA, appendix E: 8 positive and 7 negative quantiles between offset and 1/2, and zero, over the largest."""
    offset = 1 - (1 / 30 + 1 / 32) / 2
    positive = torch.special.ndtri(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -torch.special.ndtri(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    codes = torch.cat((positive, negative, torch.zeros(1, dtype=torch.float64))).sort().values / positive.max()
    torch.testing.assert_close(torch.tensor(NF4_CODES, dtype=torch.float64), codes, atol=2e-6, rtol=0)


@pytest.mark.parametrize("shape", [(64, 64), (640, 640), (513, 320)])
def test_nf4_equals_bitsandbytes_up_to_the_scales_of_the_blocks(shape):
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = make(*shape)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    exact = functional.dequantize_4bit(packed, state)
    nested = functional.dequantize_4bit(*functional.quantize_4bit(weight, blocksize=64, quant_type="nf4",
                                                                 compress_statistics=True))
    kept = NF4Weight.of(weight)
    ours = kept.dequantised(torch.float32)
    torch.testing.assert_close(state.code, torch.tensor(NF4_CODES))
    same = (kept.codes == packed.view(-1)).float().mean()  # two codes a byte; only those at the middle of two differ
    assert same > 0.97, f"{1 - same:.1%} of the bytes differ"
    assert error(ours, exact) < 0.035
    assert error(ours, weight) < 1.005 * min(error(exact, weight), error(nested, weight))


def test_nf4_takes_half_a_byte_a_weight_and_a_little():
    kept = NF4Weight.of(make(1280, 1280))
    assert kept.num_bytes / (1280 * 1280) < 0.5165
    assert kept.num_bytes == sum(part.nbytes for part in (kept.codes, kept.block_codes, kept.group_ranges))


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 129), (65, 64), (130, 2048)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_of_any_size(shape, dtype):
    weight = make(*shape, dtype=dtype)
    found = NF4Weight.of(weight).dequantised(dtype)
    assert found.shape == shape and found.dtype == dtype
    assert error(found, weight) < 0.13


def test_blocks_of_zeros_stay_zero():
    weight = make(8, 256)
    weight[2:4] = 0
    for kept in (Int8Weight.of(weight), NF4Weight.of(weight), NF4Weight.of(torch.zeros(4, 64))):
        found = kept.dequantised(torch.float32)
        assert torch.isfinite(found).all()
        assert not found[2:4].any()


@pytest.mark.parametrize("kind", [Int8Weight, NF4Weight])
def test_piece_by_piece_equals_the_whole(kind, monkeypatch):
    weight = make(100, 1280)
    whole = kind.of(weight)
    monkeypatch.setattr("crumb.kernels.quantize.PIECE", 64 * 256)
    pieces = kind.of(weight)
    for name in vars(whole):
        one, other = getattr(whole, name), getattr(pieces, name)
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, name
    assert torch.equal(whole.dequantised(torch.float16), pieces.dequantised(torch.float16))


class LargestResult(TorchDispatchMode):
    """The bytes of the largest tensor that any operation made, views of tensors given to it aside."""

    def __init__(self, given):
        super().__init__()
        self.bytes, self.given = 0, {given.untyped_storage().data_ptr()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.given:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("kind", [Int8Weight, NF4Weight])
def test_needs_little_beside_the_weight_and_the_result(kind):
    weight = make(2048, 1280, dtype=torch.float16)
    with LargestResult(weight) as largest:
        kept = kind.of(weight)
    assert largest.bytes <= max(kept.num_bytes, 8 * PIECE)


@pytest.mark.parametrize("kind", [Int8Weight, NF4Weight])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(kind, value):
    weight = make(8, 64)
    weight[3, 5] = value
    with pytest.raises(ValueError, match="not finite"):
        kind.of(weight)


@pytest.mark.parametrize("kind", [Int8Weight, NF4Weight])
def test_moves_to_another_device(kind):
    kept = kind.of(make(8, 64))
    moved = kept.to("meta")
    assert moved.shape == kept.shape and moved.num_bytes == kept.num_bytes
    assert all(part.device.type == "meta" for part in vars(moved).values() if isinstance(part, torch.Tensor))


def test_the_buffer_is_the_same_memory_until_a_larger_weight_comes():
    device = torch.device("cpu")
    first = weight_buffer(torch.Size((4, 8)), torch.float64, device)
    assert weight_buffer(torch.Size((2, 16)), torch.float64, device).data_ptr() == first.data_ptr()
    larger = weight_buffer(torch.Size((8, 8)), torch.float64, device)
    assert weight_buffer(torch.Size((4, 8)), torch.float64, device).data_ptr() == larger.data_ptr()
    assert weight_buffer(torch.Size((4, 8)), torch.float32, device).dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", [Int8Weight, NF4Weight])
def test_a_gpu_quantises_as_the_processor_does(kind):
    weight = make(1280, 5120, dtype=torch.float16)
    here, there = kind.of(weight), kind.of(weight.cuda()).to("cpu")
    for name in vars(here):
        one, other = getattr(here, name), getattr(there, name)
        if isinstance(one, torch.Tensor) and not one.is_floating_point():
            # A GPU divides by a number as times its inverse, so that a value at the middle of two may round either way. In
            # 16 bits half the largest lies there exactly: that alone makes 2 of 10,000 scales of NF4's blocks differ.
            assert (one != other).float().mean() < 1e-3, name
    assert error(there.dequantised(torch.float32), here.dequantised(torch.float32)) < 1e-3
