"""Pictures and prompts -> a training set that holds nothing but cached tensors.

After this the VAE and the text encoders have left memory; the U-Net has not yet arrived.
"""

import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from crumb.engine.data.caches import OnProgress, cache_latents, cache_prompts, read_entry
from crumb.engine.memory.placement import Placement
from crumb.engine.model.load import load_text_encoders, load_vae
from crumb.engine.model.text import encode_prompts
from crumb.engine.run.events import EventWriter
from crumb.profiles.base_model import BaseModel, fingerprint
from crumb.profiles.buckets import Crop, steps_per_epoch
from crumb.profiles.dataset import Picture, Scan, caption_for, held_out_indices
from crumb.profiles.data_rules import plan_crops
from crumb.profiles.errors import CrumbError
from crumb.profiles.paths import cache_dir
from crumb.profiles.plan import Plan

log = logging.getLogger("crumb")

NUM_ENTRIES_IN_MEMORY = 1024
"""Cache entries kept decoded; one of SDXL's latents or prompts takes 0.3 to 0.6 MB."""


@dataclass(frozen=True)
class Batch:
    """B pictures of one bucket. Tensors are on the CPU."""

    latent_mean: Tensor  # (B, 4, H, W) fp32, unscaled
    latent_std: Tensor
    encoder_hidden_states: Tensor  # (B, 77, D)
    pooled: Tensor  # (B, P)
    time_ids: Tensor  # (B, 6)


@dataclass(frozen=True, eq=False)
class TrainingSet:
    """What the loop trains on, all from the caches."""

    pictures: list[Picture]
    crops: list[Crop]
    captions: list[str]
    latent_paths: list[Path]
    prompt_paths: dict[str, Path]
    buckets: dict[tuple[int, int], list[int]]
    held_out: list[int]
    """Indices of pictures that are measured and never trained on; in no bucket."""
    base_sha256: str

    @property
    def trained(self) -> list[int]:
        """Indices of the pictures that are trained on."""
        return [index for index in range(len(self.pictures)) if index not in self.held_out]

    def num_batches(self, batch_size: int) -> int:
        """Batches in one epoch."""
        return steps_per_epoch({size: len(indices) for size, indices in self.buckets.items()}, batch_size)

    def digest(self) -> str:
        """Of everything that the batches are made of: cache names are hashes of pictures, crops, VAE and prompts."""
        content = [[path.name for path in self.latent_paths], self.captions, sorted(self.buckets.items())]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def batch(self, indices: list[int]) -> Batch:
        latents = [load_entry(self.latent_paths[index]) for index in indices]
        prompts = [load_entry(self.prompt_paths[self.captions[index]]) for index in indices]
        return Batch(
            latent_mean=torch.stack([entry["mean"] for entry in latents]),
            latent_std=torch.stack([entry["std"] for entry in latents]),
            encoder_hidden_states=torch.stack([entry["encoder_hidden_states"] for entry in prompts]),
            pooled=torch.stack([entry["pooled"] for entry in prompts]),
            time_ids=torch.tensor([time_ids(self.pictures[index], self.crops[index]) for index in indices]),
        )


def time_ids(picture: Picture, crop: Crop) -> list[float]:
    """SDXL's size conditioning: original height and width, crop top and left, target height and width.

    (Podell et al. 2023, section 2.2; the crop is measured in the resized picture.)
    """
    return [float(value) for value in (picture.height, picture.width, crop.top, crop.left, crop.height, crop.width)]


def prepare(plan: Plan, base: BaseModel, scan: Scan, placement: Placement, events: EventWriter,
            progress: Callable[[str], OnProgress]) -> TrainingSet:
    """Encodes what no earlier run has encoded; only one encoder is in memory at any time.

    `progress` gives each phase its callback.
    """
    crops = plan_crops(scan.pictures, plan.resolution, plan.buckets, plan.upscale)
    captions = [caption_for(picture, plan.trigger, plan.class_word) for picture in scan.pictures]
    _report_pictures(plan, scan, crops, events)
    events.emit("phase", phase="hash")
    base_sha256 = fingerprint(base.path, progress("hash"))
    vae_path = Path(plan.vae) if plan.vae else None
    vae_sha256 = fingerprint(vae_path) if vae_path else base_sha256
    precision = str(placement.encoder_dtype)

    events.emit("phase", phase="cache latents")
    latent_paths = cache_latents(
        list(zip(scan.pictures, crops)),
        lambda: load_vae(base, vae_path, placement.encoder_dtype, placement.device),
        vae_sha256, precision, cache_dir() / "latents",
        tiled=plan.vae_tiling, on_progress=progress("cache latents"), device=placement.device,
    )
    events.emit("phase", phase="cache captions")
    prompt_paths = cache_prompts(
        [*captions, *plan.sample_prompts, ""],
        lambda: load_text_encoders(base, placement.encoder_dtype, placement.device),
        encode_prompts, base_sha256, precision, cache_dir() / "prompts",
        on_progress=progress("cache captions"),
    )
    buckets = defaultdict(list)
    held_out = held_out_indices(len(scan.pictures), plan.held_out_pictures, plan.seed)
    for index, (picture, crop) in enumerate(zip(scan.pictures, crops)):
        if index not in held_out:
            buckets[crop.width, crop.height] += [index] * (picture.repeats * plan.repeats)
    return TrainingSet(scan.pictures, crops, captions, latent_paths, prompt_paths, dict(buckets), held_out, base_sha256)


@lru_cache(NUM_ENTRIES_IN_MEMORY)
def load_entry(path: Path) -> dict[str, Tensor]:
    """A cache entry that is known to have been written."""
    entry = read_entry(path)
    if entry is None:
        raise CrumbError(f"The cache entry {path} was lost or damaged while training. `crumb resume` makes it again and "
                         f"goes on from the last checkpoint.")
    return entry


def _report_pictures(plan: Plan, scan: Scan, crops: list[Crop], events: EventWriter) -> None:
    for problem in scan.problems:
        events.emit("warning", text=f"{problem.path.name}: {problem.text}")
    for picture, crop in zip(scan.pictures, crops):
        events.emit("picture", path=str(picture.path), size=[picture.width, picture.height],
                    bucket=[crop.width, crop.height], resized=[crop.resized_width, crop.resized_height],
                    crop=[crop.left, crop.top], cropped_share=round(crop.cropped_share, 4),
                    repeats=picture.repeats * plan.repeats)
        log.info("%s: %dx%d -> bucket %dx%d, resized to %dx%d, cut at left %d top %d, %.1f %% cut away", picture.path,
                 picture.width, picture.height, crop.width, crop.height, crop.resized_width, crop.resized_height,
                 crop.left, crop.top, 100 * crop.cropped_share)
