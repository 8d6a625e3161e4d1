"""The order of copies and computing on a device that does both at once, at speeds of its own: a simulation of its queues."""

import random
from collections import deque
from types import SimpleNamespace

import pytest

from crumb.engine.memory.stream import BlockRing, Packed


class Device:
    """Two queues of operations, which begin and end at random as far as their waits let them; and the host that fills them."""

    def __init__(self, depth: int, random: random.Random):
        self.random, self.slots = random, [None] * depth
        self.queues = {"compute": deque(), "copy": deque()}
        self.running: dict[str, object] = {"compute": None, "copy": None}
        self.events, self.num_given = set(), 0

    def give(self, queue: str, *operation) -> None:
        self.queues[queue].append(operation)

    def event(self, queue: str) -> int:
        self.num_given += 1
        self.give(queue, "record", self.num_given)
        return self.num_given

    def advance(self, queue: str) -> bool:
        if self.running[queue]:
            self._end(queue)
        elif not self.queues[queue]:
            return False
        elif self.queues[queue][0][0] == "wait":
            if self.queues[queue][0][1] not in self.events:
                return False
            self.queues[queue].popleft()
        else:
            self._begin(queue)
        return True

    def _begin(self, queue):
        kind, *rest = self.queues[queue].popleft()
        if kind == "record":
            self.events.add(*rest)
            return
        self.running[queue] = kind, *rest
        block, slot = rest
        if kind == "copy":
            self.slots[slot] = "half a copy"
        else:
            assert self.slots[slot] == block, f"{block} begins with {self.slots[slot]}"

    def _end(self, queue):
        kind, block, slot = self.running[queue]
        self.running[queue] = None
        if kind == "copy":
            self.slots[slot] = block
        else:
            assert self.slots[slot] == block, f"{block} ends with {self.slots[slot]}"

    def let_time_pass(self, until_idle: bool = False) -> None:
        while until_idle or self.random.random() < 0.7:
            order = self.random.sample(sorted(self.queues), 2)
            if not any(self.advance(queue) for queue in order):
                assert not until_idle or not any(self.queues.values()), "each waits for the other"
                break


def simulated(depth: int, num_blocks: int, random: random.Random) -> tuple[BlockRing, Device]:
    """The ring as on a GPU, its streams being those of a Device."""
    device = Device(depth, random)

    def copy(place, host, work_so_far):
        device.give("copy", "wait", work_so_far)
        device.give("copy", "copy", host[0], place)
        return device.event("copy")

    def wait(arrival):
        if arrival in device.events:
            return True
        device.give("compute", "wait", arrival)
        return False

    lane = SimpleNamespace(work_so_far=lambda: device.event("compute"), copy=copy, wait=wait)
    blocks = [Packed((number,), number % depth) for number in range(num_blocks)]
    return BlockRing(blocks, lane, [None] * depth, [None] * depth), device


def compute(ring, device, number, backward=False):
    ring.acquire(number, backward)
    for _ in range(device.random.randint(1, 3)):
        device.let_time_pass()
        device.give("compute", "use", number, number % len(ring.owners))


@pytest.mark.parametrize("depth", [2, 3, 4, 7])
@pytest.mark.parametrize("seed", range(20))
def test_no_copy_is_too_early_and_no_use_either(depth, seed):
    """Whole steps, passes without gradients, passes broken off anywhere, and blocks in any order at all."""
    draw = random.Random(seed)
    num_blocks = draw.randint(depth, 12)
    ring, device = simulated(depth, num_blocks, draw)
    for _ in range(12):
        kind, first = draw.choice(["step", "no gradients", "broken", "any"]), draw.randrange(num_blocks)
        if kind == "any":
            for _ in range(10):
                compute(ring, device, draw.randrange(num_blocks), draw.random() < 0.5)
            continue
        ring.first_to_learn = first if kind == "step" else num_blocks
        for number in range(num_blocks if kind != "broken" else first):
            compute(ring, device, number)
        for number in range(num_blocks - 1, first - 1, -1) if kind == "step" else ():
            compute(ring, device, number, backward=True)
    device.let_time_pass(until_idle=True)


@pytest.mark.parametrize("depth", [2, 3, 5])
def test_copies_go_on_while_blocks_compute(depth):
    """In the midst of a pass a block is sent for before the depth - 1 ones ahead of it compute, and waits for none of them."""
    ring, device = simulated(depth, 12, random.Random(0))
    device.let_time_pass = lambda until_idle=False: None
    ring.first_to_learn, log = 0, []
    give = device.give
    device.give = lambda queue, *operation: (log.append(operation), give(queue, *operation))
    order = [*[(number, False) for number in range(12)], *[(number, True) for number in range(11, -1, -1)]]
    for number, backward in order:
        compute(ring, device, number, backward)
    for place, (kind, *rest) in enumerate(log):
        if kind == "copy" and rest[0] not in range(depth):
            used = [operation[1] for operation in log[place:] if operation[0] == "use"]
            meanwhile = used[:used.index(rest[0])]
            assert len(set(meanwhile)) == depth - 1, f"{rest[0]} is fetched while only {set(meanwhile)} compute"
