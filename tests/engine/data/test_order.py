"""The order of batches: complete, repeatable, and told by the step number alone."""

import random
from collections import Counter

from crumb.engine.data.order import epoch_batches, mirrored_views
from crumb.profiles.buckets import steps_per_epoch

REPEATS = {0: 3, 1: 1, 2: 2, 3: 1, 4: 5, 5: 1, 6: 1}
SQUARE, TALL, WIDE, SMALL = (1024, 1024), (832, 1216), (1216, 832), (512, 512)
SIZE_OF = {0: SQUARE, 1: SQUARE, 2: TALL, 3: TALL, 4: WIDE, 5: SQUARE, 6: SMALL}
BUCKETS = {
    size: [index for index in REPEATS if SIZE_OF[index] == size for _ in range(REPEATS[index])]
    for size in set(SIZE_OF.values())
}


def test_every_picture_comes_as_often_as_it_repeats():
    for batch_size in (1, 2, 4, 99):
        for epoch in range(3):
            batches = epoch_batches(BUCKETS, batch_size, 7, epoch)
            assert Counter(index for batch in batches for index in batch) == REPEATS
            assert all(0 < len(batch) <= batch_size for batch in batches)
            assert all(len({SIZE_OF[index] for index in batch}) == 1 for batch in batches), "a batch mixes buckets"
            counts = {size: len(indices) for size, indices in BUCKETS.items()}
            assert len(batches) == steps_per_epoch(counts, batch_size)


def test_order_depends_on_seed_and_epoch_alone():
    random.seed(1)
    first = epoch_batches(BUCKETS, 2, 7, 0)
    state = random.getstate()
    other_way_round = {size: BUCKETS[size][::-1] for size in reversed(list(BUCKETS))}
    assert epoch_batches(other_way_round, 2, 7, 0) == first
    assert random.getstate() == state
    assert epoch_batches(BUCKETS, 2, 7, 1) != first
    assert epoch_batches(BUCKETS, 2, 8, 0) != first


def test_half_of_the_views_are_mirrored_and_the_step_alone_tells_which():
    random.seed(1)
    state = random.getstate()
    views = [mirrored_views(4, 42, step, micro) for step in range(500) for micro in (0, 1)]
    assert abs(sum(map(sum, views)) / 4000 - 0.5) < 0.03 and random.getstate() == state
    assert views == [mirrored_views(4, 42, step, micro) for step in range(500) for micro in (0, 1)]
    assert len({tuple(one) for one in views}) == 16, "each picture is drawn for itself"
    assert [mirrored_views(4, 43, step, 0) for step in range(9)] != [mirrored_views(4, 42, step, 0) for step in range(9)]


def test_order_never_changes_between_versions():
    """Golden: a checkpoint of an older release goes on with the same pictures."""
    batches = epoch_batches({(64, 64): list(range(6)), (64, 128): [6, 7, 8]}, 2, 42, 0)
    assert batches == [[1, 5], [8, 7], [6], [3, 4], [2, 0]]
