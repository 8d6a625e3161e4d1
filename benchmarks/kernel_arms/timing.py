"""How an arm is measured. On a GPU three times are told apart, because a small kernel is often waited for in vain:

    ms        what the GPU works on it, its instructions all queued beforehand, by CUDA events
    host_ms   what Python and torch take to queue them
    wall_ms   from an idle GPU until the last instruction is done; about the larger of both

The L2 cache is overwritten before every run. The arms of a case take turns, in another order each round.
On a processor all three are the wall's.
"""

import gc
import statistics
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

Pass = Callable[[], Any]


@dataclass
class Arm:
    """One way to compute a case. `passes`: what is timed, by name; the last one is the one whose memory counts."""

    passes: dict[str, Pass]
    outputs: Callable[[], dict[str, Tensor]] | None = None
    """What is compared with the reference, by name: y, dX, dA, dB."""
    weights: list[Tensor] = field(default_factory=list)
    """What is there before and does not count as saved for backward."""
    facts: dict[str, Any] = field(default_factory=dict)
    reference: Callable[[], dict[str, Tensor]] | None = None


@dataclass
class Case:
    """`arms`: how each is made, by name; one that begins with "crumb" is crumb's, one with "floor" computes less."""

    group: str
    name: str
    arms: dict[str, Callable[[], Arm]]
    times: int = 1
    """How often one step of SDXL has it."""
    facts: dict[str, Any] = field(default_factory=dict)
    warmups: int | None = None
    runs: int | None = None
    counts_launches: bool = False


BROKE = "broke the GPU"


class BrokenDevice(RuntimeError):
    """After a fault in a kernel nothing more can be computed in this process. `rows`: those of the case it happened in."""

    rows: list[dict[str, Any]] = []


class Stopwatch:
    def __init__(self, device: torch.device, warmups: int, runs: int):
        self.device, self.warmups, self.runs, self.on_gpu = device, warmups, runs, device.type == "cuda"
        self.has_profiled = False
        if self.on_gpu:
            l2 = torch.cuda.get_device_properties(device).L2_cache_size
            self.flushing = torch.empty(max(2 * l2, 1 << 26), dtype=torch.uint8, device=device)
            cycles = 20_000_000
            # The fastest of some: a GPU at rest begins with slow clocks.
            self._cycles_per_ms = cycles / min(self._elapsed(lambda: torch.cuda._sleep(cycles)) for _ in range(10))

    def _elapsed(self, function: Pass, backlog_ms: float = 0.0) -> float:
        """Milliseconds between two events around it. `backlog_ms`: how long the GPU is held back while it is queued."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if backlog_ms:
            torch.cuda._sleep(int(backlog_ms * self._cycles_per_ms))
        self.flushing.zero_()
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def _apart(self, function: Pass) -> tuple[float, float]:
        """Host and wall milliseconds from an idle GPU."""
        if self.on_gpu:
            self.flushing.zero_()
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        queued = time.perf_counter()
        if self.on_gpu:
            torch.cuda.synchronize()
        return (queued - start) * 1e3, (time.perf_counter() - start) * 1e3

    def compare(self, functions: dict[str, Pass], warmups: int | None, runs: int | None) -> dict[str, dict[str, Any]]:
        """Figures of each, or {"error": what it raised}."""
        warmups, runs = (own if own is not None else given
                         for own, given in ((warmups, self.warmups), (runs, self.runs)))
        names, found = list(functions), {}
        host, wall, device = ({name: [] for name in names} for _ in range(3))
        for turn in range(warmups + runs):
            first = turn % max(1, len(names))
            for name in names[first:] + names[:first]:
                if name in found:
                    continue
                try:
                    if turn < warmups:
                        host_ms, wall_ms = self._apart(functions[name])
                        host[name].append(host_ms)
                        wall[name].append(wall_ms)
                    elif self.on_gpu:
                        backlog_ms = min(100.0, 1.5 * statistics.median(host[name]) + 0.05)
                        device[name].append(self._elapsed(functions[name], backlog_ms))
                    else:
                        device[name].append(self._apart(functions[name])[1])
                except Exception as error:
                    found[name] = {"error": self.survived(error, name)}
        for name in names:
            if name not in found:
                later = len(host[name]) // 2  # the first runs compile
                found[name] = {
                    "ms": statistics.median(device[name]), "p10_ms": _quantile(device[name], 0.1),
                    "p90_ms": _quantile(device[name], 0.9), "host_ms": statistics.median(host[name][later:]),
                    "wall_ms": statistics.median(wall[name][later:]), "runs": len(device[name])}
        return found

    def survived(self, error: Exception, arm: str) -> str:
        """What an arm raised, in a line; BrokenDevice with the arm's name where the device took harm."""
        text = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:300]
        if isinstance(error, ModuleNotFoundError):
            return f"not installed: {error.name}"
        print("".join(traceback.format_exception(error)[-6:]), flush=True)
        # The frames hold tensors, and a failed arm must not cost the others their memory.
        traceback.clear_frames(error.__traceback__)
        if self.on_gpu:
            try:
                torch.cuda.synchronize()
                torch.zeros(1, device=self.device).item()
            except Exception as broken:
                raise BrokenDevice(arm, text) from broken
        return text

    def peak_bytes(self, function: Pass) -> int | None:
        """What it takes beside what was there before, its results included."""
        if not self.on_gpu:
            function()
            return None
        from crumb.kernels import quantize

        quantize._BUFFERS.clear()  # the buffer that all layers share counts as if this one were the only layer
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = function()
        torch.cuda.synchronize()
        del results
        return torch.cuda.max_memory_allocated() - before

    def launches(self, function: Pass) -> int | None:
        """Kernels, by the profiler; on a processor torch's operations, and only the first time: the profiler is slow."""
        if self.has_profiled and not self.on_gpu:
            return None
        self.has_profiled = True
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.on_gpu else [])]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with profile(activities=activities) as profiler:
                function()
                if self.on_gpu:
                    torch.cuda.synchronize()
            kind = torch.autograd.DeviceType.CUDA if self.on_gpu else torch.autograd.DeviceType.CPU
            return sum(event.device_type == kind and not getattr(event, "is_user_annotation", False)
                       and not event.name.startswith(("Memcpy", "Memset", "ProfilerStep", "Optimizer."))
                       for event in profiler.events())

    def syncs(self, function: Pass) -> int | None:
        """How often it waits for the GPU: by torch's own warnings, and calls of torch.cuda.synchronize."""
        if not self.on_gpu:
            function()
            return None
        calls, real = [], torch.cuda.synchronize

        def count(*args, **kwargs):
            calls.append(None)
            return real(*args, **kwargs)

        with warnings.catch_warnings(record=True) as caught, patch("torch.cuda.synchronize", count), sync_warnings():
            warnings.simplefilter("always")
            function()
        return len(calls) + sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


@contextmanager
def sync_warnings():
    torch.cuda.set_sync_debug_mode("warn")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def saved_bytes(function: Pass, weights: list[Tensor]) -> int:
    """What a forward pass keeps for backward, each storage once, without weights."""
    known = {weight.untyped_storage().data_ptr() for weight in weights}
    storages: dict[int, int] = {}
    kept = []  # a storage that is freed meanwhile could give its address to another

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor.detach())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(storages.values())


def relative_error(found: Tensor, right: Tensor) -> float:
    norm = right.double().norm()
    return float((found.detach().double() - right.double()).norm() / norm.clamp_min(1e-300))


def measure(stopwatch: Stopwatch, case: Case, without: set[str]) -> list[dict[str, Any]]:
    """A row for each arm but those that broke the device before."""
    rows = {name: {"group": case.group, "case": case.name, "arm": name, "times": case.times, **case.facts, "passes": {}}
            for name in case.arms}
    for name in without & set(rows):
        rows[name]["error"] = "left out: it broke the GPU in an earlier case"
    gc.collect()
    gc.disable()  # its pauses would count as time, and what it frees as memory not taken
    try:
        _measure(stopwatch, case, rows)
    except BrokenDevice as broken:
        arm, text = broken.args
        for name, row in rows.items():
            row.setdefault("error", f"{BROKE}: {text}" if name == arm else f"cut short: {arm} broke the GPU")
        broken.rows = list(rows.values())
        raise
    finally:
        gc.enable()
    return list(rows.values())


def _measure(stopwatch: Stopwatch, case: Case, rows: dict[str, dict[str, Any]]) -> None:
    made: dict[str, Arm] = {}
    for name, make in case.arms.items():
        if "error" in rows[name]:
            continue
        try:
            arm = make()
            rows[name] |= arm.facts
            _compare_once(arm, rows[name])
            made[name] = arm
        except Exception as error:
            rows[name]["error"] = stopwatch.survived(error, name)
    for part in dict.fromkeys(part for arm in made.values() for part in arm.passes):
        timed = {name: arm.passes[part] for name, arm in made.items() if part in arm.passes and "error" not in rows[name]}
        for name, figures in stopwatch.compare(timed, case.warmups, case.runs).items():
            if "error" in figures:
                rows[name]["error"] = figures["error"]
            else:
                rows[name]["passes"][part] = figures
    for name, arm in made.items():
        if "error" in rows[name]:
            continue
        *_, whole = arm.passes.values()
        asked = {"peak_bytes": stopwatch.peak_bytes, "syncs": stopwatch.syncs}
        if case.counts_launches:
            asked["launches"] = stopwatch.launches
        if "forward" in arm.passes:
            asked["saved_bytes"] = lambda _, arm=arm: saved_bytes(arm.passes["forward"], arm.weights)
        for figure, ask in asked.items():
            try:
                rows[name][figure] = ask(whole)
            except Exception as error:
                rows[name]["note"] = f"{figure}: {stopwatch.survived(error, name)}"


def _compare_once(arm: Arm, row: dict[str, Any]) -> None:
    if arm.outputs is None or arm.reference is None:
        return
    right = arm.reference()
    row["errors"] = {name: relative_error(found, right[name]) for name, found in arm.outputs().items() if name in right}


def _quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
