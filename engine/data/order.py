"""Which pictures form which batch at which step, and which of them are mirrored.

Pure functions of seed and epoch or step, apart from every other random number: a resumed run needs only its step number to
go on with the very pictures it would have seen.
"""

import random
from collections.abc import Mapping, Sequence

Buckets = Mapping[tuple[int, int], Sequence[int]]


def mirrored_views(num_pictures: int, seed: int, step: int, micro_step: int) -> list[bool]:
    """Which pictures of one forward pass are shown mirrored, half of them in the long run, where their subset allows it.

    Drawn for each picture whether it may be or not: what one subset allows must not change another's draws.
    """
    generator = random.Random(f"crumb mirror {seed} {step} {micro_step}")
    return [generator.random() < 0.5 for _ in range(num_pictures)]


def epoch_batches(buckets: Buckets, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """All batches of one epoch, in order.

    `buckets` maps (width, height) to picture indices, each written as often as it repeats. A batch never mixes
    buckets, so the last one of a bucket may be smaller.
    """
    # A string seed is hashed with SHA-512: the same on every machine and in every Python.
    generator = random.Random(f"crumb order {seed} {epoch}")
    batches = []
    for size in sorted(buckets):
        indices = sorted(buckets[size])
        generator.shuffle(indices)
        batches += [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
    generator.shuffle(batches)
    return batches
