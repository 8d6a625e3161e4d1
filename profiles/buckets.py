"""Which size a picture is trained at: aspect buckets, the resize, the crop, and steps in an epoch.

Pure arithmetic, so that the wizard's preview, the data-set doctor and the engine show and use the very same crop.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class Crop:
    """How one picture becomes one training picture: resize to cover the bucket, then cut its middle out.

    `width`, `height` are the bucket; `left`, `top` lie in the resized picture. All in pixels.
    """

    width: int
    height: int
    resized_width: int
    resized_height: int
    left: int
    top: int

    @property
    def cropped_share(self) -> float:
        """Share of the resized picture's area that is cut away, 0 to 1."""
        return 1 - (self.width * self.height) / (self.resized_width * self.resized_height)


@lru_cache(maxsize=32)
def _bucket_sizes(resolution: int, step: int) -> tuple[tuple[int, int], ...]:
    if step < 1 or resolution < step:
        raise ValueError(f"resolution {resolution} must be at least one step of {step}")
    area = resolution * resolution
    shortest = max(step, resolution // 2 // step * step)
    longest = max(step, resolution * 2 // step * step)
    sizes = set()
    for width in range(shortest, longest + 1, step):
        height = min(longest, area // width // step * step)
        if height >= shortest:
            sizes.update([(width, height), (height, width)])
    return tuple(sorted(sizes))


def bucket_sizes(resolution: int, step: int = 64) -> list[tuple[int, int]]:
    """All (width, height) a picture of any aspect may train at, sorted by width.

    Sides are multiples of `step` from half to twice the resolution, the area never exceeds resolution², and each
    width has its largest height (sd-scripts, `make_bucket_resolutions`).
    """
    return list(_bucket_sizes(resolution, step))


def _cover(width: int, height: int, bucket: tuple[int, int]) -> Crop:
    scale = max(bucket[0] / width, bucket[1] / height)
    resized_width = max(bucket[0], round(width * scale))
    resized_height = max(bucket[1], round(height * scale))
    left, top = (resized_width - bucket[0]) // 2, (resized_height - bucket[1]) // 2
    return Crop(*bucket, resized_width, resized_height, left, top)


def _nearest(width: int, height: int, sizes: list[tuple[int, int]]) -> tuple[int, int]:
    """The size of nearest aspect; of equally near ones the larger."""
    aspect = math.log(width / height)
    return min(sizes, key=lambda size: (abs(math.log(size[0] / size[1]) - aspect), -size[0] * size[1], size))


@lru_cache(maxsize=4096)
def assign(
    width: int, height: int, resolution: int, step: int = 64, buckets: bool = True, upscale: bool = False
) -> Crop:
    """The bucket and crop of a picture of this size.

    A picture smaller than its bucket is not enlarged unless `upscale`: it trains at the largest multiple of `step`
    that fits inside it, and at one step when it is smaller than that. Without `buckets` every picture is cut square.
    """
    sizes = list(_bucket_sizes(resolution, step))
    longest = max(size[0] for size in sizes)
    inner_width = min(max(step, width // step * step), longest)
    inner_height = min(max(step, height // step * step), longest)
    if not buckets:
        side = resolution // step * step
        if not upscale:
            side = min(side, inner_width, inner_height)
        return _cover(width, height, (side, side))
    nearest = _nearest(width, height, sizes)
    if upscale or (nearest[0] <= width and nearest[1] <= height):
        return _cover(width, height, nearest)
    if inner_width * inner_height <= resolution * resolution:
        return _cover(width, height, (inner_width, inner_height))
    return _cover(width, height, _nearest(width, height, [s for s in sizes if s[0] <= width and s[1] <= height]))


def steps_per_epoch(counts: Mapping[tuple[int, int], int], batch_size: int) -> int:
    """Batches in one epoch: pictures of different buckets never share a batch, so each bucket rounds up alone.

    `counts` maps a bucket to its pictures, repeats counted.
    """
    return sum(math.ceil(count / batch_size) for count in counts.values())
