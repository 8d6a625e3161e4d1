"""Streams the frozen weights of chosen blocks from the host's memory through a few places on the device.

    host      block 0 | block 1 | block 2 | block 3 | block 4 | ...      one page-locked buffer each
    device    slot 0  | slot 1  | slot 2                                 block i is in slot i mod depth while it computes

A block's tensors are views of its slot for good, so what autograd keeps of them points where they will be again. They are
brought there by `acquire`, before a block's forward and again before anything of its backward, which is at the same time
when it is computed again. What the pass needs next follows while the block computes. Nothing is ever copied back: weights
that are frozen don't change.

Why a slot is never written over too early, on a GPU:
- `acquire(i)` brings block j ≠ i only into a slot other than i's, and only after all work that the compute stream had been
  given before. So the block that was there must have no work left to be given. (And block i's own copy waits likewise.)
- Forward: a block's work has been given when its forward returns.
- Backward: autograd takes what is ready in the reverse order of how it was made. All of block i was made after the last
  node of block i - 1, whose hook acquires, and whatever of it isn't ready waits for something of block i that is. So all of
  block i is done first: also its keys and values, which are a way of their own where the text encoders learn. And what
  comes before a block's last node in backward is not of the block.
- A pass broken off (out of memory) leaves who is in which slot, and the order of the streams, as true as before.

`acquire` asks which block's weights are in the slot, never which pass it is: what comes unexpectedly (a pass without
gradients, blocks that no gradient reaches, two graphs at a time) costs a wait and is right all the same.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from functools import partial

import torch
from torch import Tensor, nn

from crumb.engine.memory.host import give_back_freed, host_buffer, require_memory
from crumb.kernels.quantize import Int8Weight, NF4Weight

ALIGNMENT = 256
"""Bytes. That of memory on a GPU: kernels load 16 at a time from wherever a tensor begins."""

MAX_WAITS = 4096
"""How many measured waits are held for `take_statistics`; where nobody asks, the oldest are forgotten."""


@dataclass(frozen=True)
class Statistics:
    wait_s: float
    """How long the device had nothing to do but wait for weights."""
    copied_bytes: int
    num_loads: int


@dataclass(frozen=True, eq=False)
class Packed:
    """A block's weights on the host and the part of a slot that they go to: both uint8, of the same length."""

    host: Tensor
    place: Tensor


@dataclass(eq=False)
class BlockRing:
    """`owners` and `arrivals` are of the slots: whose weights are there or on their way, and when they will have come."""

    blocks: list[Packed]
    lane: "CudaLane | HostLane"
    owners: list[int | None]
    arrivals: list[object | None]
    first_to_learn: int = 0
    """The first block that the last forward pass will be followed back to; only to guess well what is needed next."""
    copied_bytes: int = field(default=0, init=False)
    num_loads: int = field(default=0, init=False)

    def acquire(self, index: int, backward: bool = False) -> None:
        """Has the device wait for the block's weights, and sends for those that are needed next."""
        depth = len(self.owners)
        if depth < len(self.blocks) or None in self.owners:
            self._send_for(index, backward)
        slot = index % depth
        if self.arrivals[slot] is not None and self.lane.wait(self.arrivals[slot]):
            self.arrivals[slot] = None

    def _send_for(self, index: int, backward: bool) -> None:
        claimed: dict[int, int] = {}
        work_so_far = None
        for block in self._needed_from(index, backward):
            slot = block % len(self.owners)
            if claimed.setdefault(slot, block) != block:
                break
            if self.owners[slot] != block:
                work_so_far = work_so_far or self.lane.work_so_far()
                self._load(block, slot, work_so_far)

    def _needed_from(self, index: int, backward: bool) -> Iterator[int]:
        """This block, then the others in the order in which they are likely to be needed. A wrong guess only costs time."""
        count, first = len(self.blocks), self.first_to_learn
        yield index
        yield from range(index - 1, first - 1, -1) if backward else range(index + 1, count)
        if not backward:
            yield from range(count - 1, first - 1, -1)
        yield from range(count)

    def _load(self, block: int, slot: int, work_so_far: object) -> None:
        packed = self.blocks[block]
        self.owners[slot] = None  # nobody's, should this fail
        self.arrivals[slot] = self.lane.copy(packed.place, packed.host, work_so_far)
        self.owners[slot] = block
        self.num_loads += 1
        self.copied_bytes += len(packed.host)

    def take_statistics(self) -> Statistics:
        """Since the last time. Waits that the device hasn't come to yet count next time: ask after the step's loss was read."""
        taken = Statistics(self.lane.take_wait_s(), self.copied_bytes, self.num_loads)
        self.copied_bytes = self.num_loads = 0
        return taken


def stream_blocks(blocks: dict[str, nn.Module], device: torch.device, depth: int = 3) -> BlockRing:
    """Moves the blocks' frozen tensors to the host for good and has each block's forward and backward fetch them.

    In place, after LoRA is attached, blocks are made lean and the chosen ones of them are recomputed. `blocks` are in the
    order of a forward pass; `depth` is how many have a place on the device: the one that computes and the next ones. What
    learns moves to the device. RequestError where the host's memory can't hold it.
    """
    if depth < 2:
        raise ValueError(f"depth is {depth}: with fewer than 2 slots nothing could be fetched while a block computes")
    _refuse_shared(blocks)
    sizes = [_end_of(_layout(block)) for block in blocks.values()]
    give_back_freed()
    # What is on the host already is there once, and its block a second time while it is packed.
    coming = sum(tensor.nbytes for block in blocks.values() for tensor, _, _ in _layout(block) if tensor.device.type != "cpu")
    require_memory(coming + max(sizes, default=0), f"Streaming {len(blocks)} blocks of the base")

    depth = min(depth, len(sizes))
    slots = [torch.empty(max(sizes[first::depth]), dtype=torch.uint8, device=device) for first in range(depth)]
    lane = CudaLane(device, slots) if device.type == "cuda" else HostLane()
    ring = BlockRing([], lane, [None] * depth, [None] * depth)
    for index, (block, size) in enumerate(zip(blocks.values(), sizes)):
        slot = slots[index % depth]
        # `data`: writing to the slot is not a change that autograd may object to, who counts those of a tensor and its views.
        ring.blocks.append(Packed(_pack(block, size, slot), slot.data[:size]))
        give_back_freed()
        block.forward = partial(_streamed, ring, index, block.forward)
    return ring


def _streamed(ring: BlockRing, index: int, forward: Callable[..., Tensor], *args, **kwargs) -> Tensor:
    if index == 0:
        ring.first_to_learn = len(ring.blocks)
    ring.acquire(index)
    output = forward(*args, **kwargs)
    if output.requires_grad:
        ring.first_to_learn = min(ring.first_to_learn, index)
        # The last node is the first of the block in backward, and its hook comes before what it kept is looked at. It is
        # no node of its own: that would have to give out a view of the block's output.
        output.grad_fn.register_prehook(lambda _: ring.acquire(index, backward=True))
    return output


# Packing.

def _pack(block: nn.Module, size: int, slot: Tensor) -> Tensor:
    """The block's frozen tensors in one host buffer; they themselves become views of the slot, and what they held is freed."""
    host = host_buffer(size, locked=slot.is_cuda)
    for tensor, start, put in _layout(block):
        _view(host, start, tensor).copy_(tensor.detach())
        put(_view(slot, start, tensor))
    for parameter in block.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(slot.device)
    return host


def _layout(block: nn.Module) -> Iterator[tuple[Tensor, int, Callable[[Tensor], None]]]:
    """Each frozen tensor, the byte where it begins, and how to put another in its place."""
    start = 0
    for tensor, put in _frozen(block):
        yield tensor, start, put
        start += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT


def _end_of(layout: Iterator[tuple[Tensor, int, Callable[[Tensor], None]]]) -> int:
    return max((start + tensor.nbytes for tensor, start, _ in layout), default=0)


def _frozen(block: nn.Module) -> Iterator[tuple[Tensor, Callable[[Tensor], None]]]:
    for module in block.modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if not tensor.requires_grad:
                yield tensor, partial(setattr, tensor, "data")
        weight = getattr(module, "weight", None)
        if isinstance(weight, Int8Weight | NF4Weight):
            for part in fields(weight):
                if isinstance(tensor := getattr(weight, part.name), Tensor):
                    yield tensor, partial(setattr, weight, part.name)


def _view(memory: Tensor, start: int, like: Tensor) -> Tensor:
    """As the tensor is, in its memory format, at this place."""
    strides = torch.empty_like(like, device="meta").stride()  # without gaps, should `like` have some
    return memory[start:start + like.nbytes].view(like.dtype).as_strided(like.shape, strides)


def _refuse_shared(blocks: dict[str, nn.Module]) -> None:
    """One tensor can't be in two slots."""
    owner: dict[Tensor, str] = {}
    for name, block in blocks.items():
        for tensor, _ in _frozen(block):
            if owner.setdefault(tensor, name) != name:
                raise ValueError(f"the blocks {owner[tensor]} and {name} share weights: stream only one of them")


# The ways to copy.

class CudaLane:
    """Copies on a stream of their own, ordered with the compute stream by events: the host never waits."""

    def __init__(self, device: torch.device, slots: list[Tensor]):
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.waits: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque(maxlen=MAX_WAITS)
        for slot in slots:
            slot.record_stream(self.stream)  # a slot that is let go of is used for something else after its last copy

    def work_so_far(self) -> torch.cuda.Event:
        return torch.cuda.current_stream(self.device).record_event()

    def copy(self, place: Tensor, host: Tensor, work_so_far: torch.cuda.Event) -> torch.cuda.Event:
        self.stream.wait_event(work_so_far)
        with torch.cuda.stream(self.stream):
            place.copy_(host, non_blocking=True)
        return self.stream.record_event()

    def wait(self, arrival: torch.cuda.Event) -> bool:
        """Whether it had come already."""
        if arrival.query():
            return True
        compute = torch.cuda.current_stream(self.device)
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record(compute)
        compute.wait_event(arrival)
        after.record(compute)
        self.waits.append((before, after))
        return False

    def take_wait_s(self) -> float:
        seconds = 0.0
        while self.waits and self.waits[0][1].query():
            before, after = self.waits.popleft()
            seconds += before.elapsed_time(after) / 1000
        return seconds


class HostLane:
    """Copies at once, where there are no streams; the time that takes is the wait."""

    def __init__(self):
        self.seconds = 0.0

    def work_so_far(self) -> None:
        return None

    def copy(self, place: Tensor, host: Tensor, work_so_far: None) -> None:
        started = time.perf_counter()
        place.copy_(host)
        self.seconds += time.perf_counter() - started

    def wait(self, arrival: None) -> bool:
        return True

    def take_wait_s(self) -> float:
        taken, self.seconds = self.seconds, 0.0
        return taken
