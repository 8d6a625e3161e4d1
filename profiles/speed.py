"""Seconds per training step by arithmetic: work over rate, transfers beside it. Nothing here has been measured.

What a card really needs is learned from its own runs: profiles/measured.py keeps them and gives the factor.
"""

from dataclasses import astuple, dataclass, replace

from crumb.profiles.gpu_table import Gpu

ARITHMETIC = 1
"""Raised whenever a prediction changes, so that factors measured against the former one are not used on the new."""

EFFICIENCY = 0.5
"""Share of a card's tensor rate that a whole step's products reach. An assumption: large products alone reach 0.7 to 0.9 of
what is printed, SDXL's are small at batch 1, and clocks fall under load."""

MEMORY_EFFICIENCY = 0.8
"""The same for what norms, activations and dequantising move through the card's memory. An assumption."""

OVERHEAD_S = 0.03
"""Optimizer, drawing noise, fetching the batch, saying how it went. An assumption."""

INT8_GAIN = 1.0
"""How much faster than 16-bit ones products in int8 are. GeForce's printed rate is four times as high, but no step has been
measured to gain by it: activations must be rounded first, and the blocks' other work stays what it is."""

TERA, GIGA = 1e12, 1e9


@dataclass(frozen=True)
class Pass:
    """What is done once, forwards or backwards, for all pictures of a step: operations by kind, and bytes."""

    linear_flops: float = 0.0
    conv_flops: float = 0.0
    attention_flops: float = 0.0
    """Products inside attention; its projections are linears."""
    lora_flops: float = 0.0
    moved_bytes: float = 0.0
    """Read and written in the card's memory beside the products: norms, activations, weights that are dequantised."""
    streamed_bytes: float = 0.0
    """Of the base, fetched from host memory over PCIe."""

    def __add__(self, other: "Pass") -> "Pass":
        return Pass(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, factor: float) -> "Pass":
        return Pass(*(value * factor for value in astuple(self)))

    @property
    def flops(self) -> float:
        return self.linear_flops + self.conv_flops + self.attention_flops + self.lora_flops


@dataclass(frozen=True)
class Work:
    """One step. `recomputed` is the part of the forward pass that is done again during backward."""

    forward: Pass
    backward: Pass
    recomputed: Pass = Pass()

    @property
    def backwards(self) -> Pass:
        """All that happens between the loss and the last gradient. What is computed again is fetched only once for both."""
        return replace(self.backward + self.recomputed, streamed_bytes=self.backward.streamed_bytes)


@dataclass(frozen=True)
class PassTime:
    """Transfers run beside the work, so the longer of the two counts."""

    compute_s: float
    moving_s: float
    transfer_s: float

    @property
    def seconds(self) -> float:
        return max(self.compute_s + self.moving_s, self.transfer_s)

    @property
    def waiting_s(self) -> float:
        """Spent on nothing but the transfer."""
        return self.seconds - self.compute_s - self.moving_s


@dataclass(frozen=True)
class Speed:
    """A step's seconds, their parts, and what they were reckoned from. `factor`: measured over predicted, 1 where unknown."""

    work: Work
    gpu: Gpu
    tflops: float
    forward: PassTime
    backward: PassTime
    overhead_s: float
    efficiency: float
    factor: float

    @property
    def predicted_s(self) -> float:
        """Without what earlier runs have taught: what a measurement is to be compared with."""
        return self.forward.seconds + self.backward.seconds + self.overhead_s

    @property
    def seconds(self) -> float:
        return self.predicted_s * self.factor

    def explain(self) -> str:
        """The arithmetic in one line."""
        work, both = self.work, (self.forward, self.backward)
        total = work.forward + work.backwards
        twice = f" ({work.recomputed.flops / TERA:.1f} of them a second time)" if work.recomputed.flops else ""
        parts = [f"{total.flops / TERA:.1f} TFLOP{twice} at {self.tflops:.1f} TFLOP/s x {self.efficiency:g} = "
                 f"{sum(one.compute_s for one in both):.2f} s"]
        if total.moved_bytes:
            parts.append(f"{total.moved_bytes / GIGA:.1f} GB through its memory at {self.gpu.bandwidth_gb_per_s:g} GB/s x "
                         f"{MEMORY_EFFICIENCY:g} = {sum(one.moving_s for one in both):.2f} s")
        if total.streamed_bytes:
            waiting_s = sum(one.waiting_s for one in both)
            hidden = f"{waiting_s:.2f} s of it waited for" if waiting_s > 0.005 else "hidden behind it"
            each = f"2 x {work.forward.streamed_bytes / GIGA:.1f}" if work.forward.streamed_bytes == (
                work.backwards.streamed_bytes) else f"{total.streamed_bytes / GIGA:.1f}"
            parts.append(f"{each} GB over PCIe at {self.gpu.pcie_gb_per_s:.0f} GB/s = "
                         f"{sum(one.transfer_s for one in both):.2f} s, {hidden}")
        parts.append(f"{self.overhead_s:.2f} s besides")
        learned = f" x {self.factor:.2f}, as measured here" if self.factor != 1 else ""
        return f"{'; '.join(parts)}: {self.predicted_s:.2f} s{learned}"


def seconds_per_step(work: Work, gpu: Gpu, precision: str, base_format: str = "no", factor: float = 1.0,
                     overhead_s: float = OVERHEAD_S, efficiency: float = EFFICIENCY) -> Speed | None:
    """max(work, transfer) of the forward pass, plus that of the backward pass, plus what is the same every time.

    `precision` is the plan's mixed_precision, `base_format` its quantize_base; an int8 base is computed in int8, an NF4 one
    in 16 bits. None where nothing is known of the card, or it lacks the precision.
    """
    tflops = gpu.tflops(precision)
    if not tflops or not gpu.bandwidth_gb_per_s:
        return None
    if (work.forward + work.backwards).streamed_bytes and not gpu.pcie_gb_per_s:
        return None
    gain = INT8_GAIN if base_format == "int8" else 1.0

    def time(done: Pass) -> PassTime:
        flops = done.flops - done.linear_flops + done.linear_flops / gain
        return PassTime(flops / (tflops * TERA * efficiency),
                        done.moved_bytes / (gpu.bandwidth_gb_per_s * GIGA * MEMORY_EFFICIENCY),
                        done.streamed_bytes / (gpu.pcie_gb_per_s * GIGA) if done.streamed_bytes else 0.0)

    return Speed(work, gpu, tflops, time(work.forward), time(work.backwards), overhead_s, efficiency, factor)
