"""8-bit moments: how far codes are from what they stand for, that they are right on average, how Adam fares with them."""

import pytest
import torch

from crumb.kernels.block_states import BLOCK, Moments, encode, hash_bits, noise_bits, read_moments, write_moments
from crumb.kernels.language import jit, tl, triton

SEEDS = [torch.tensor(seed) for seed in range(2000)]


def make_moments(num_blocks, spread, seed=0):
    """m and v as gradients of unlike sizes leave them: sizes log-normal, |m| of the order of √v."""
    generator = torch.Generator().manual_seed(seed)
    root = 1e-5 * torch.exp(spread * torch.randn(num_blocks, BLOCK, generator=generator))
    return root * 0.3 * torch.randn(num_blocks, BLOCK, generator=generator), root**2


def round_trip(m, v, seed):
    moments = Moments.zeros(len(m), 8, m.device)
    moments.write(slice(0, len(m)), m, v, torch.ones(len(m), dtype=torch.bool), seed)
    return moments.read(slice(0, len(m)))


@pytest.mark.parametrize("spread", [0.1, 1.0, 2.0])
def test_a_code_is_next_to_its_value(spread):
    m, v = make_moments(16, spread)
    m_read, v_read = round_trip(m, v, SEEDS[1])
    root, root_read = v.sqrt(), v_read.sqrt()
    level = 255 * (root / root.amax(1, keepdim=True))**0.25
    spacing = ((level + 1)**4 - (level - 1)**4) / 255**4 * root.amax(1, keepdim=True)
    assert ((root_read - root).abs() <= spacing).all()
    quotient, quotient_read = m / root_read, m_read / root_read
    assert ((quotient_read - quotient).abs() <= quotient.abs().amax(1, keepdim=True) / 127 * 1.001).all()


def test_codes_are_right_on_average():
    m, v = make_moments(1, 1.0)
    reads = [round_trip(m, v, seed) for seed in SEEDS]
    for name, value, read in (("m", m, [m for m, _ in reads]), ("root of v", v.sqrt(), [v.sqrt() for _, v in reads])):
        read = torch.stack(read)
        error = read.mean(0) - value
        assert (error.abs() <= 5 * read.std(0) / len(SEEDS)**0.5 + 1e-6 * value.abs()).all(), name


def test_zero_stays_zero_and_nothing_else_becomes_zero():
    m, v = make_moments(4, 1.0)
    m[0], v[0], m[1, 7], v[1, 7], v[2, 3] = 0, 0, 0, 0, 1e-30
    m_read, v_read = round_trip(m, v, SEEDS[0])
    assert (v_read == 0).equal(v == 0)
    assert (m_read[0] == 0).all() and m_read[1, 7] == 0
    assert m_read.isfinite().all() and v_read.isfinite().all()


def test_blocks_that_do_not_move_keep_their_codes():
    moments = Moments.zeros(3, 8, torch.device("cpu"))
    moments.write(slice(0, 3), *make_moments(3, 1.0), torch.ones(3, dtype=torch.bool), SEEDS[0])
    before = [kept.clone() for kept in vars(moments).values()]
    moments.write(slice(0, 3), *make_moments(3, 1.0, seed=1), torch.tensor([True, False, True]), SEEDS[1])
    for old, new in zip(before, vars(moments).values()):
        assert old[1].equal(new[1]) and not old[0].equal(new[0]) and not old[2].equal(new[2])


def test_random_bits_are_even_and_do_not_repeat():
    index = torch.arange(4096, dtype=torch.int32)
    bits = torch.stack([noise_bits(index, seed) for seed in SEEDS[:64]])
    for half in (bits & 0xFFFF, (bits >> 16) & 0xFFFF):
        share = half.double() / 65536
        assert abs(share.mean() - 0.5) < 0.003 and abs(share.var() - 1 / 12) < 0.001
        centred = share - 0.5
        for first, second in ((centred[1:], centred[:-1]), (centred[:, 1:], centred[:, :-1])):
            assert abs((first * second).mean() * 12) < 0.01


def adam_error(gradients, steps, beta1=0.9, beta2=0.999):
    """Mean relative error of the updates from 8-bit moments in the second half, and of the way they add up to."""
    exact = Moments.zeros(gradients.num_blocks, 32, torch.device("cpu"))
    coded = Moments.zeros(gradients.num_blocks, 8, torch.device("cpu"))
    whole, moves = slice(0, gradients.num_blocks), torch.ones(gradients.num_blocks, dtype=torch.bool)
    errors, ways = [], {32: 0, 8: 0}
    for step in range(steps):
        g, updates = gradients(step), {}
        for bits, moments in ((32, exact), (8, coded)):
            m, v = moments.read(whole)
            m, v = m + (1 - beta1) * (g - m), beta2 * v + (1 - beta2) * g * g
            updates[bits] = m / (v.sqrt() + 1e-12)
            moments.write(whole, m, v, moves, torch.tensor(step))
            ways[bits] = ways[bits] + updates[bits]
        errors.append(((updates[8] - updates[32]).norm() / updates[32].norm()).item())
    return sum(errors[steps // 2:]) / (steps - steps // 2), ((ways[8] - ways[32]).norm() / ways[32].norm()).item()


class Gradients:
    """Noise around a mean a tenth as large; sizes log-normal within a block, each growing or falling by itself."""

    def __init__(self, spread, drift=0.0, every_64th=1.0, num_blocks=4):
        self.generator, self.num_blocks, self.shape = torch.Generator().manual_seed(0), num_blocks, (num_blocks, BLOCK)
        self.size = 1e-5 * torch.exp(spread * self._random())
        self.size[:, ::64] *= every_64th
        self.slope, self.mean = drift * self._random(), 0.1 * self._random()

    def _random(self):
        return torch.randn(self.shape, generator=self.generator)

    def __call__(self, step):
        return self.size * torch.exp(self.slope * step) * (self.mean + self._random())


@pytest.mark.parametrize(("gradients", "update", "way"), [
    (Gradients(0.1), 0.08, 0.05), (Gradients(1.0), 0.12, 0.08), (Gradients(2.0, every_64th=30), 0.2, 0.13),
    (Gradients(0.7, drift=1.5 / 1500), 0.12, 0.08)])
def test_adam_follows_32_bit_moments(gradients, update, way):
    """Bounds of the table in block_states.py, of shorter runs."""
    measured = adam_error(gradients, 1500)
    assert measured[0] < update and measured[1] < way, measured


@jit
def _there_and_back(m_ptr, v_ptr, m_code_ptr, v_code_ptr, m_scale_ptr, v_scale_ptr, seed,
                    N: tl.constexpr, BLOCK: tl.constexpr):
    blocks = tl.arange(0, N)
    index = blocks[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    moves = blocks >= 0
    write_moments(m_code_ptr, v_code_ptr, m_scale_ptr, v_scale_ptr, blocks, index, moves, tl.load(m_ptr + index),
                  tl.load(v_ptr + index), hash_bits(index, seed), True)
    m, v = read_moments(m_code_ptr, v_code_ptr, m_scale_ptr, v_scale_ptr, blocks, index, moves, True)
    tl.store(m_ptr + index, m)
    tl.store(v_ptr + index, v)


@pytest.mark.skipif(triton is None, reason="no Triton")
@pytest.mark.parametrize("spread", [0.1, 2.0])
def test_triton_gives_the_codes_of_plain_torch(spread):
    m, v = make_moments(8, spread)
    m[0], v[0], v[1, 5] = 0, 0, 0
    index = torch.arange(8 * BLOCK, dtype=torch.int32).view(8, BLOCK)
    expected = encode(m, v, noise_bits(index, torch.tensor(123457)))
    codes = Moments.zeros(8, 8, m.device)
    m_read, v_read = m.clone(), v.clone()
    _there_and_back[(1,)](m_read, v_read, codes.m, codes.v, codes.m_scale, codes.v_scale, 123457, N=8, BLOCK=BLOCK)
    for name, got, wanted in zip(("m", "v", "m_scale", "v_scale"), vars(codes).values(), expected):
        torch.testing.assert_close(got.float(), wanted, rtol=1e-6, atol=0, msg=name)
    for got, wanted in zip((m_read, v_read), codes.read(slice(0, 8))):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=0)
