"""Prodigy with 8-bit states over one flat buffer: two kernels a group of parameters, and d stays on the device.

Mishchenko & Defazio 2024, algorithm 4, in the order of the package prodigyopt; γ = d η √(1 - β2ᵏ) / (1 - β1ᵏ) the step's
size (the fraction is 1 without bias correction), σ = γ d / d0 (with safeguard_warmup d² / d0 in s):

    m ← β1 m + (1 - β1) d g                first kernel, all with the old d
    v ← β2 v + (1 - β2) d² g²
    s ← β3 s + σ g                         of every `slice_p`-th entry, as are the sums
    N ← β3 N + σ Σ g (p0 - p)
    d̂ = d_coef N / Σ |s|                   then, on the device: d ← max(d, d̂), held back by growth_rate
    p ← (1 - γ λ) p - γ m / (√v + d ε)     second kernel: the new d, but the γ of the old one

m and v: block_states.py. s is kept in bfloat16, rounded at random so that the small steps of its mean (1 - β3 = 0.0005)
count; p0 in 16 bits of the largest weight of its block. The first step moves the sliced weights onto these 16 bits, by 2⁻¹⁶
of that largest one at most: an error in p0 would add Σ g (error) to N, and early in the run that is as much as all the rest.
Together 2.43 bytes a weight with every 11th entry sliced. `bits=32` keeps all in fp32.

Against prodigyopt with the same slices on two small LoRAs, 500 steps, six seeds: d within 0.7 % all the way, the last losses
within 5 % (tests/kernels/test_prodigy_8bit.py). Slicing itself changes d by up to 20 % there, where it leaves 372 entries.

Otherwise than prodigyopt a group of rate 0 rests wholly; there its last momentum would go on moving it. β1 = 0 is refused.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from crumb.kernels.block_states import BLOCK, Moments, hash_bits, noise_bits, read_moments, write_moments
from crumb.kernels.dispatch import uses_triton
from crumb.kernels.flat_optimizer import PLAIN_BLOCKS, FlatOptimizer
from crumb.kernels.language import cdiv, jit, tl
from crumb.kernels.launch import launch_on

START_STEPS = 32767
"""Steps of p0's 16 bits from 0 to the largest weight of a block."""


class Prodigy8bit(FlatOptimizer):
    """prodigyopt.Prodigy's rule and arguments; `slice_p` is 11 with 8 bits and 1 with 32 where it is not given.

    Each group's "d" is a tensor on the device: float() of it waits for the GPU, nothing else here does.
    """

    live = ("d",)

    def __init__(self, params, lr: float = 1.0, betas: tuple[float, float] = (0.9, 0.999), beta3: float | None = None,
                 eps: float = 1e-8, weight_decay: float = 0.0, decouple: bool = True, use_bias_correction: bool = False,
                 safeguard_warmup: bool = False, d0: float = 1e-6, d_coef: float = 1.0, growth_rate: float = math.inf,
                 slice_p: int | None = None, bits: int = 8, gradient_dtype: torch.dtype = torch.float32):
        slice_p = slice_p or (11 if bits == 8 else 1)
        if not (lr > 0 and eps > 0 and d0 > 0 and 0 < betas[0] < 1 and 0 < betas[1] < 1 and slice_p > 0 and bits in (8, 32)):
            raise ValueError(f"lr={lr}, betas={betas}, eps={eps}, d0={d0}, slice_p={slice_p}, bits={bits}")
        super().__init__(params, dict(
            lr=lr, betas=betas, beta3=beta3, eps=float(eps), weight_decay=weight_decay, decouple=decouple,
            use_bias_correction=use_bias_correction, safeguard_warmup=safeguard_warmup, d0=d0, d_coef=d_coef,
            growth_rate=growth_rate), gradient_dtype)
        device = self.masters.device
        self.slice_p = slice_p
        self.moments = Moments.zeros(self.num_blocks, bits, device)
        self.first_slices = [0]
        for first, end in zip(self.first_blocks, self.first_blocks[1:]):
            self.first_slices.append(self.first_slices[-1] + cdiv((end - first) * BLOCK, slice_p))
        self.first_block_of, self.first_slice_of = (
            torch.tensor(firsts[:-1], dtype=torch.int32, device=device) for firsts in (self.first_blocks, self.first_slices))
        s_dtype, p0_dtype = (torch.bfloat16, torch.int16) if bits == 8 else (torch.float32, torch.float32)
        self.s = torch.zeros(self.first_slices[-1], dtype=s_dtype, device=device)
        self.p0 = torch.zeros(self.first_slices[-1], dtype=p0_dtype, device=device)
        self.p0_scale = torch.zeros(self.num_blocks if bits == 8 else 0, device=device)
        self._knows_start = False
        starts = {"d": d0, "d_max": d0, "d_hat": d0, "d_numerator": 0.0, "d_denom": 0.0}
        self.estimate = {name: torch.tensor(value, dtype=torch.float64, device=device) for name, value in starts.items()}
        self.k = torch.zeros((), dtype=torch.int32, device=device)
        for group in self.param_groups:
            group["d"] = self.estimate["d"]

    def states(self) -> dict[str, Tensor]:
        return {**vars(self.moments), "s": self.s, "p0": self.p0, "p0_scale": self.p0_scale, **self.estimate, "k": self.k}

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self._knows_start = self.k.item() > 0

    def _update(self, active: Tensor, factor: Tensor) -> None:
        rates = {float(group["lr"]) for group in self.param_groups} - {0.0}
        if len(rates) > 1:
            raise RuntimeError(f"Prodigy has one learning rate for all parameters; 0 is the only other. Set here: {rates}")
        if not rates:
            return
        if not self._knows_start:
            self._remember_start()
        spans = [span for span in self._group_spans() if span[0]["lr"]]
        gamma, sigma, s_gain = self._sizes(rates.pop())
        moments, apply = _moments_plain, _apply_plain
        if uses_triton("prodigy_8bit", self.masters):
            moments, apply = _moments_triton, _apply_triton
        sums = moments(self, spans, active, factor, torch.stack((self.estimate["d"], s_gain)).float())
        moved = self._estimate_d(sums, sigma)
        apply(self, spans, active * moved, torch.stack((gamma, self.estimate["d"])).float())

    @property
    def _betas(self) -> tuple[float, float, float]:
        group = self.param_groups[0]
        beta1, beta2 = group["betas"]
        return beta1, beta2, math.sqrt(beta2) if group["beta3"] is None else group["beta3"]

    def _sizes(self, rate: float) -> tuple[Tensor, Tensor, Tensor]:
        """γ, σ and what gradients enter s with."""
        group, d, (beta1, beta2, _) = self.param_groups[0], self.estimate["d"], self._betas
        gamma = d * rate
        if group["use_bias_correction"]:
            step = self.k.double() + 1
            gamma = gamma * (-torch.expm1(step * math.log(beta2))).sqrt() / -torch.expm1(step * math.log(beta1))
        sigma = gamma * d / group["d0"]
        return gamma, sigma, d * d / group["d0"] if group["safeguard_warmup"] else sigma

    def _estimate_d(self, sums: Tensor, sigma: Tensor) -> Tensor:
        """The new d from the sums over all sliced entries; returns whether there is one: without a gradient all stays."""
        group, old = self.param_groups[0], self.estimate
        denominator, moved = sums[1], sums[1] > 0
        numerator = self._betas[2] * old["d_numerator"] + sigma * sums[0]
        d_hat = group["d_coef"] * numerator / denominator
        d_max = torch.maximum(old["d_max"], d_hat)
        d = torch.where(old["d"] == group["d0"], torch.maximum(old["d"], d_hat), old["d"])
        new = {"d": torch.minimum(d_max, d * group["growth_rate"]), "d_max": d_max, "d_hat": d_hat,
               "d_numerator": numerator, "d_denom": denominator}
        for name, value in new.items():
            old[name].copy_(torch.where(moved, value, old[name]))
        self.k += moved
        return moved

    def _remember_start(self) -> None:
        """Takes p0 just before the first step, as a LoRA to start from may be loaded after the optimizer is made."""
        if self.moments.eight_bit:
            torch.linalg.vector_norm(self.masters.view(-1, BLOCK), math.inf, 1, out=self.p0_scale)
            self.p0_scale /= START_STEPS
        for places, element, _ in self._slices(0, len(self._parameters)):
            p = self.masters[element]
            if self.moments.eight_bit:
                scale = self.p0_scale[element // BLOCK]
                p = torch.where(scale > 0, p / scale, 0).round()
                self.masters[element] = p * scale
            self.p0[places] = p.to(self.p0.dtype)
        self._knows_start = True

    def _slices(self, first: int, last: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Sliced entries of some tensors, so many at a time: their places in s and p0, in the flat buffer, their tensor."""
        end, count = self.first_slices[last], PLAIN_BLOCKS * BLOCK // 8
        for start in range(self.first_slices[first], end, count):
            places = slice(start, min(start + count, end))
            place = torch.arange(places.start, places.stop, dtype=torch.int32, device=self.masters.device)
            tensor = torch.searchsorted(self.first_slice_of, place, right=True) - 1
            element = self.first_block_of[tensor].long() * BLOCK + (place - self.first_slice_of[tensor]) * self.slice_p
            yield places, element, tensor


def _decays(group: dict) -> tuple[float, float]:
    """Weight decay as a part of the gradient and as a part of the step."""
    return (0.0, group["weight_decay"]) if group["decouple"] else (group["weight_decay"], 0.0)


def _moments_triton(optimizer: Prodigy8bit, spans: list, active: Tensor, factor: Tensor, now: Tensor) -> Tensor:
    """Updates m, v and s; returns Σ g (p0 - p) and Σ |s|. `now`: d and what gradients enter s with."""
    moments, (beta1, beta2, beta3) = optimizer.moments, optimizer._betas
    sums = torch.zeros(2, optimizer.num_blocks, device=now.device)  # one a block and added up in order: the same every time
    launch = launch_on("prodigy_8bit_moments", now.device)
    s = optimizer.s.view(torch.int16) if moments.eight_bit else optimizer.s
    for group, first, last in spans:
        first_block, end = optimizer.first_blocks[first], optimizer.first_blocks[last]
        _moments_kernel[(cdiv(end - first_block, launch.blocks["BLOCKS"]),)](
            optimizer.masters, optimizer.gradients, moments.m, moments.v, moments.m_scale, moments.v_scale,
            s, optimizer.p0, optimizer.p0_scale, optimizer.tensor_of, optimizer.first_block_of,
            optimizer.first_slice_of, active, factor, now, optimizer.k, sums[0], sums[1], first_block, end - first_block,
            float(_decays(group)[0]), beta1, 1 - beta1, beta2, 1 - beta2, beta3,
            SLICE=optimizer.slice_p, EIGHT_BIT=moments.eight_bit, BLOCK=BLOCK, **launch.options())
    return sums.sum(1, dtype=torch.float64)


def _apply_triton(optimizer: Prodigy8bit, spans: list, active: Tensor, now: Tensor) -> None:
    """Moves the weights. `now`: γ and the new d."""
    moments = optimizer.moments
    launch = launch_on("prodigy_8bit_apply", now.device)
    for group, first, last in spans:
        first_block, end = optimizer.first_blocks[first], optimizer.first_blocks[last]
        _apply_kernel[(cdiv(end - first_block, launch.blocks["BLOCKS"]),)](
            optimizer.masters, moments.m, moments.v, moments.m_scale, moments.v_scale, optimizer.tensor_of, active, now,
            first_block, end - first_block, float(_decays(group)[1]), group["eps"],
            EIGHT_BIT=moments.eight_bit, BLOCK=BLOCK, **launch.options())


def _moments_plain(optimizer: Prodigy8bit, spans: list, active: Tensor, factor: Tensor, now: Tensor) -> Tensor:
    moments, (beta1, beta2, beta3), (d, s_gain) = optimizer.moments, optimizer._betas, now
    masters, gradients = optimizer.masters, optimizer.gradients
    sums = torch.zeros(2, dtype=torch.float64, device=now.device)
    for group, first, last in spans:
        decay = _decays(group)[0]
        for blocks, tensor in optimizer._plain_spans(first, last):
            p, g = (flat.view(-1, BLOCK)[blocks] for flat in (masters, gradients))
            g = g.float() * factor + decay * p
            m, v = moments.read(blocks)
            m, v = beta1 * m + d * (1 - beta1) * g, beta2 * v + d * d * (1 - beta2) * g * g
            moments.write(blocks, m, v, active[tensor] != 0, optimizer.k)
        for places, element, tensor in optimizer._slices(first, last):
            moves, p = active[tensor] != 0, masters[element]
            g = torch.where(moves, gradients[element].float() * factor + decay * p, 0)
            p0, s = optimizer.p0[places].float(), optimizer.s[places]
            if moments.eight_bit:
                p0 = p0 * optimizer.p0_scale[element // BLOCK]
            new = torch.where(moves, beta3 * s.float() + s_gain * g, 0)
            sums += torch.stack(((g * (p0 - p)).sum(dtype=torch.float64), new.abs().sum(dtype=torch.float64)))
            if moments.eight_bit:
                new = _to_bfloat16(new, noise_bits(element.int(), optimizer.k))
            s.copy_(torch.where(moves, new, s))
    return sums


def _to_bfloat16(value: Tensor, bits: Tensor) -> Tensor:
    """Rounded up or down at random, right on average."""
    return ((value.view(torch.int32) + (bits & 0xFFFF)) >> 16).to(torch.int16).view(torch.bfloat16)


def _apply_plain(optimizer: Prodigy8bit, spans: list, active: Tensor, now: Tensor) -> None:
    gamma, d = now
    for group, first, last in spans:
        for blocks, tensor in optimizer._plain_spans(first, last):
            p = optimizer.masters.view(-1, BLOCK)[blocks]
            m, v = optimizer.moments.read(blocks)
            moved = p - gamma * _decays(group)[1] * p - gamma * m / (v.sqrt() + d * group["eps"])
            p.copy_(torch.where(active[tensor, None] != 0, moved, p))


@jit
def _moments_kernel(p_ptr, g_ptr, m_ptr, v_ptr, m_scale_ptr, v_scale_ptr, s_ptr, p0_ptr, p0_scale_ptr, tensor_of_ptr,
                    first_block_of_ptr, first_slice_of_ptr, active_ptr, factor_ptr, now_ptr, k_ptr, progress_ptr, length_ptr,
                    first_block, num_blocks, decay, beta1, weight1, beta2, weight2, beta3,
                    SLICE: tl.constexpr, EIGHT_BIT: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    blocks = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    inside = blocks < num_blocks
    blocks += first_block
    tensor = tl.load(tensor_of_ptr + blocks, mask=inside, other=0)
    moves = inside & (tl.load(active_ptr + tensor, mask=inside, other=0) != 0)
    entry = tl.arange(0, BLOCK)[None, :]
    index = blocks[:, None] * BLOCK + entry
    p = tl.load(p_ptr + index, mask=moves[:, None], other=0)
    g = tl.load(g_ptr + index, mask=moves[:, None], other=0).to(tl.float32) * tl.load(factor_ptr) + decay * p
    d = tl.load(now_ptr)
    m, v = read_moments(m_ptr, v_ptr, m_scale_ptr, v_scale_ptr, blocks, index, moves, EIGHT_BIT)
    m = beta1 * m + d * weight1 * g
    v = beta2 * v + d * d * weight2 * g * g
    bits = hash_bits(index, tl.load(k_ptr))
    write_moments(m_ptr, v_ptr, m_scale_ptr, v_scale_ptr, blocks, index, moves, m, v, bits, EIGHT_BIT)

    within = (blocks - tl.load(first_block_of_ptr + tensor, mask=inside, other=0))[:, None] * BLOCK + entry
    place = tl.load(first_slice_of_ptr + tensor, mask=inside, other=0)[:, None] + within // SLICE
    sliced = moves[:, None] & (within % SLICE == 0)
    p0 = tl.load(p0_ptr + place, mask=sliced, other=0).to(tl.float32)
    s = tl.load(s_ptr + place, mask=sliced, other=0)
    if EIGHT_BIT:
        p0 *= tl.load(p0_scale_ptr + blocks, mask=moves, other=0)[:, None]
        s = (s.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    s = tl.where(sliced, beta3 * s + tl.load(now_ptr + 1) * g, 0)
    tl.store(progress_ptr + blocks, tl.sum(tl.where(sliced, g * (p0 - p), 0), 1), mask=inside)
    tl.store(length_ptr + blocks, tl.sum(tl.abs(s), 1), mask=inside)
    if EIGHT_BIT:
        s = ((s.to(tl.int32, bitcast=True) + (bits & 0xFFFF).to(tl.int32)) >> 16).to(tl.int16)
    tl.store(s_ptr + place, s, mask=sliced)


@jit
def _apply_kernel(p_ptr, m_ptr, v_ptr, m_scale_ptr, v_scale_ptr, tensor_of_ptr, active_ptr, now_ptr,
                  first_block, num_blocks, decay, eps, EIGHT_BIT: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    blocks = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    inside = blocks < num_blocks
    blocks += first_block
    tensor = tl.load(tensor_of_ptr + blocks, mask=inside, other=0)
    moves = inside & (tl.load(active_ptr + tensor, mask=inside, other=0) != 0)
    index = blocks[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    gamma, d = tl.load(now_ptr), tl.load(now_ptr + 1)
    p = tl.load(p_ptr + index, mask=moves[:, None], other=0)
    m, v = read_moments(m_ptr, v_ptr, m_scale_ptr, v_scale_ptr, blocks, index, moves, EIGHT_BIT)
    p = p - gamma * decay * p - gamma * m / (tl.sqrt(v) + d * eps)
    tl.store(p_ptr + index, p, mask=moves[:, None])
