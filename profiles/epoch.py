"""What one epoch holds: who is held out, which views each bucket has, and what to remark on. Wizard and engine both ask here.

A view is one showing of a picture; a picture that repeats three times has three views an epoch.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from crumb.profiles.buckets import Crop, steps_per_epoch
from crumb.profiles.dataset import held_out_indices
from crumb.profiles.pictures import Picture
from crumb.profiles.subsets import Subset

NUM_NAMED = 3
"""Buckets that a finding names; of more it says how many."""

Size = tuple[int, int]


@dataclass(frozen=True)
class Rotation:
    """Regularization views of one bucket: an epoch takes the next `num_views` of `views`, round and round."""

    views: list[int]
    num_views: int

    def of_epoch(self, epoch: int) -> list[int]:
        start = epoch * self.num_views
        return [self.views[number % len(self.views)] for number in range(start, start + self.num_views)]


@dataclass(frozen=True)
class Epoch:
    """Views by bucket (width, height), as indices of pictures; a bucket has as many views in every epoch."""

    trained: dict[Size, list[int]] = field(default_factory=dict)
    """Each picture as often as it repeats."""
    regularization: dict[Size, Rotation] = field(default_factory=dict)

    @property
    def num_trained(self) -> int:
        return sum(map(len, self.trained.values()))

    @property
    def num_regularization(self) -> int:
        return sum(rotation.num_views for rotation in self.regularization.values())

    def counts(self) -> dict[Size, int]:
        """Views of each bucket."""
        counts = {size: len(views) for size, views in self.trained.items()}
        for size, rotation in self.regularization.items():
            if rotation.num_views:
                counts[size] = counts.get(size, 0) + rotation.num_views
        return counts

    def num_batches(self, batch_size: int) -> int:
        return steps_per_epoch(self.counts(), batch_size)

    def buckets(self, epoch: int) -> dict[Size, list[int]]:
        """The views of epoch number `epoch`."""
        buckets = {size: list(views) for size, views in self.trained.items()}
        for size, rotation in self.regularization.items():
            if rotation.num_views:
                buckets.setdefault(size, []).extend(rotation.of_epoch(epoch))
        return buckets


def hold_out(pictures: Sequence[Picture], subsets: Sequence[Subset], num_held_out: int, seed: int) -> list[int]:
    """Indices of the pictures that are only measured: never regularization pictures, which don't show what is taught."""
    taught = [index for index, picture in enumerate(pictures) if not subsets[picture.subset].regularization]
    return [taught[number] for number in held_out_indices(len(taught), num_held_out, seed)]


def plan_epoch(pictures: Sequence[Picture], subsets: Sequence[Subset], crops: Sequence[Crop],
               held_out: Sequence[int]) -> Epoch:
    """Training pictures by their repeats, and as many views of regularization pictures, evenly from all of them.

    sd-scripts also balances the two, but shows the same first regularization pictures in every epoch where there are
    more than enough; here the next epoch goes on with the next ones.
    """
    trained, regularization = defaultdict(list), defaultdict(list)
    left_out = set(held_out)
    for index, (picture, crop) in enumerate(zip(pictures, crops)):
        subset = subsets[picture.subset]
        if index not in left_out:
            views = regularization if subset.regularization else trained
            views[crop.width, crop.height] += [index] * (picture.repeats * subset.repeats)
    num_trained, num_pooled = (sum(map(len, views.values())) for views in (trained, regularization))
    rotations, seen = {}, 0
    for size, views in regularization.items():
        # Rounded at the borders between buckets, so that the shares add up to the whole.
        share = (seen + len(views)) * num_trained // num_pooled - seen * num_trained // num_pooled
        seen += len(views)
        rotations[size] = Rotation(views, share)
    return Epoch(dict(trained), rotations)


def bucket_findings(pictures: Sequence[Picture], epoch: Epoch, batch_size: int) -> list[str]:
    """Buckets that hold a single picture, those whose last batch is not full, and regularization pictures without a turn."""
    counts = epoch.counts()
    members = {size: {*epoch.trained.get(size, ())} for size in counts}
    unused = set()
    for size, rotation in epoch.regularization.items():
        (members[size] if rotation.num_views else unused).update(rotation.views)
    lone = {size: pictures[min(indices)].path.name for size, indices in members.items() if len(indices) == 1}
    short = {size: f"{count % batch_size} of {batch_size}" for size, count in counts.items() if count % batch_size}
    findings = []
    if lone and len(counts) > 1:
        findings.append(f"{_buckets(len(lone))} a single picture ({_named(lone)}): nothing else trains at that size. "
                        f"Crop it like others if you can.")
    if short:
        findings.append(f"{_buckets(len(short))} a last batch that is not full ({_named(short)}). It trains as it is; "
                        f"nothing is dropped.")
    if unused:
        findings.append(f"Regularization pictures that get no turn: {len(unused)} (first: {pictures[min(unused)].path.name}). "
                        f"There are more of them than training views, and few of that size.")
    return findings


def _buckets(number: int) -> str:
    return f"{number} bucket has" if number == 1 else f"{number} buckets have"


def _named(remarks: Mapping[Size, str]) -> str:
    named = [f"{width}x{height}: {remark}" for (width, height), remark in sorted(remarks.items())[:NUM_NAMED]]
    more = [f"{len(remarks) - NUM_NAMED} more"] if len(remarks) > NUM_NAMED else []
    return ", ".join(named + more)
