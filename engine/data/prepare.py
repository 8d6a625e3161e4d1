"""Pictures and prompts -> a training set that holds nothing but cached tensors.

After this the VAE and the text encoders have left memory; the U-Net has not yet arrived.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor

from crumb.engine.data.caches import OnProgress, View, cache_latents, cache_prompts, read_entry
from crumb.engine.data.masks import cache_masks
from crumb.engine.memory.placement import Placement
from crumb.engine.model.load import load_text_encoders, load_vae
from crumb.engine.model.text import CHUNK, PENULTIMATE, encode_prompts, pad_chunks, token_ids
from crumb.engine.model.tokenizer import make_tokenizers
from crumb.engine.run.events import EventWriter
from crumb.profiles.base_model import BaseModel, fingerprint
from crumb.profiles.buckets import Crop
from crumb.profiles.captions import caption_for_view, caption_variant, plain_caption
from crumb.profiles.data_rules import plan_crops
from crumb.profiles.dataset import Scan, mask_findings, training_caption
from crumb.profiles.epoch import Epoch, bucket_findings, hold_out, plan_epoch
from crumb.profiles.errors import CrumbError
from crumb.profiles.paths import cache_dir
from crumb.profiles.pictures import Picture, mask_of
from crumb.profiles.plan import Plan
from crumb.profiles.sample_prompts import sample_prompts, texts_of
from crumb.profiles.subsets import CAPTION_SETTINGS, Subset, effective_subsets

log = logging.getLogger("crumb")

NUM_ENTRIES_IN_MEMORY = 1024
"""Cache entries kept decoded; one of SDXL's latents or prompts takes 0.3 to 0.6 MB."""


@dataclass(frozen=True)
class Batch:
    """B pictures of one bucket. Tensors are on the CPU."""

    latent_mean: Tensor  # (B, 4, H, W) fp32, unscaled
    latent_std: Tensor
    encoder_hidden_states: Tensor | None  # (B, 77 C, D); None where the text encoders learn and encode `prompts` each time
    pooled: Tensor | None  # (B, P)
    time_ids: Tensor  # (B, 6)
    weights: Tensor  # (B,) what each picture's loss counts
    masks: Tensor | None = None  # (B, 1, H, W) from 0 to 1, where its loss counts; None = everywhere
    prompts: tuple[str, ...] = ()

    def part(self, some: slice) -> "Batch":
        """Some of the pictures."""
        return Batch(*(None if value is None else value[some] for value in (
            self.latent_mean, self.latent_std, self.encoder_hidden_states, self.pooled, self.time_ids, self.weights, self.masks,
            self.prompts)))


@dataclass(frozen=True, eq=False)
class TrainingSet:
    """What the loop trains on, all from the caches. Pictures are told by their index."""

    pictures: list[Picture]
    crops: list[Crop]
    captions: list[str]
    latent_paths: list[Path]
    prompt_paths: dict[str, Path]
    """Cache entries by text; empty where the text encoders learn."""
    epoch: Epoch
    held_out: list[int]
    """Pictures that are measured and never trained on; in no bucket."""
    base_sha256: str
    subsets: list[Subset] = field(default_factory=list)
    mirrored_paths: dict[int, Path] = field(default_factory=dict)
    """Latents of the mirrored picture, where it may be shown mirrored."""
    mask_paths: dict[int, Path] = field(default_factory=dict)
    num_variants: int = 1
    """Texts that a varying caption is shown as."""
    seed: int = 0

    @property
    def regularization(self) -> list[int]:
        """Pictures of what must not be forgotten."""
        return [index for index, picture in enumerate(self.pictures) if self.subsets[picture.subset].regularization]

    @property
    def trained(self) -> list[int]:
        """Pictures of what is taught, without the held-out ones."""
        apart = {*self.held_out, *self.regularization}
        return [index for index in range(len(self.pictures)) if index not in apart]

    def num_batches(self, batch_size: int) -> int:
        """Batches in one epoch."""
        return self.epoch.num_batches(batch_size)

    def digest(self) -> str:
        """Of everything that the batches are made of: cache names are hashes of pictures, crops, VAE, masks and prompts."""
        regularization = [(size, rotation.views, rotation.num_views) for size, rotation in self.epoch.regularization.items()]
        further = [sorted((index, path.name) for index, path in paths.items())
                   for paths in (self.mirrored_paths, self.mask_paths)]
        weights = [self.subsets[picture.subset].loss_weight for picture in self.pictures]
        texts = [[caption, *(getattr(self.subsets[picture.subset], name) for name in CAPTION_SETTINGS)]
                 for caption, picture in zip(self.captions, self.pictures)]
        content = [[path.name for path in self.latent_paths], texts, sorted(self.epoch.trained.items()),
                   sorted(regularization), *further, weights]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def text(self, index: int, view: str = "") -> str:
        """The picture's prompt: whole, or as one view (which names step and place) shows it."""
        subset = self.subsets[self.pictures[index].subset]
        if not view:
            return plain_caption(self.captions[index], subset)
        return caption_for_view(self.captions[index], subset, self.num_variants, self.seed, view)

    def batch(self, indices: list[int], mirrored: Sequence[bool] = (), view: str = "") -> Batch:
        """The pictures as tensors; those that `mirrored` says and that may be, mirrored, with captions as `view` has them."""
        shown_mirrored = [wanted and index in self.mirrored_paths
                          for index, wanted in zip(indices, mirrored or [False] * len(indices))]
        latents = [load_entry(self.mirrored_paths[index] if flipped else self.latent_paths[index])
                   for index, flipped in zip(indices, shown_mirrored)]
        texts = tuple(self.text(index, view and f"{view} {place}") for place, index in enumerate(indices))
        prompts = [load_entry(self.prompt_paths[text]) for text in texts] if self.prompt_paths else []
        return Batch(
            latent_mean=torch.stack([entry["mean"] for entry in latents]),
            latent_std=torch.stack([entry["std"] for entry in latents]),
            encoder_hidden_states=self._hidden(prompts) if prompts else None,
            pooled=torch.stack([entry["pooled"] for entry in prompts]) if prompts else None,
            time_ids=torch.tensor([time_ids(self.pictures[index], self.crops[index], flipped)
                                   for index, flipped in zip(indices, shown_mirrored)]),
            weights=torch.tensor([self.subsets[self.pictures[index].subset].loss_weight for index in indices]),
            masks=self._masks(indices, shown_mirrored, latents[0]["mean"].shape[-2:]),
            prompts=texts,
        )

    def _hidden(self, entries: list[dict[str, Tensor]]) -> Tensor:
        hidden = [entry["encoder_hidden_states"] for entry in entries]
        if len({len(one) for one in hidden}) == 1:
            return torch.stack(hidden)
        return pad_chunks(hidden, load_entry(self.prompt_paths[""])["encoder_hidden_states"])

    def _masks(self, indices: list[int], mirrored: Sequence[bool], size: torch.Size) -> Tensor | None:
        if not any(index in self.mask_paths for index in indices):
            return None
        whole = torch.ones(1, *size)
        masks = [load_entry(self.mask_paths[index])["mask"] if index in self.mask_paths else whole for index in indices]
        return torch.stack([mask.flip(-1) if flipped else mask for mask, flipped in zip(masks, mirrored)])


def time_ids(picture: Picture, crop: Crop, mirrored: bool = False) -> list[float]:
    """SDXL's size conditioning: original height and width, crop top and left, target height and width.

    (Podell et al. 2023, section 2.2; the crop is measured in the resized picture.) Of a mirrored picture, what is cut off
    on its right counts as left: as if it were mirrored first and cropped then, which diffusers' script for SDXL does.
    """
    left = crop.resized_width - crop.left - crop.width if mirrored else crop.left
    return [float(value) for value in (picture.height, picture.width, crop.top, left, crop.height, crop.width)]


def prepare(plan: Plan, base: BaseModel, scan: Scan, placement: Placement, events: EventWriter,
            progress: Callable[[str], OnProgress], share: tuple[int, int] = (0, 1)) -> TrainingSet:
    """Encodes what no earlier run has encoded; only one encoder is in memory at any time.

    `progress` gives each phase its callback. With share (r, n) this is one of n processes that encode in turns; what it
    returns can be used when all are done.
    """
    subsets = effective_subsets(plan)
    crops = plan_crops(scan.pictures, plan.resolution, plan.buckets, plan.upscale)
    held_out = hold_out(scan.pictures, subsets, plan.held_out_pictures, plan.seed)
    epoch = plan_epoch(scan.pictures, subsets, crops, held_out)
    captions = [training_caption(picture, subsets[picture.subset]) for picture in scan.pictures]
    _report_findings(plan, scan, subsets, epoch, events)
    _report_pictures(scan.pictures, crops, subsets, events)
    events.emit("phase", phase="hash")
    base_sha256 = fingerprint(base.path, progress("hash"))
    precision = str(placement.encoder_dtype)

    events.emit("phase", phase="cache latents")
    masks = {index: (mask, crop) for index, (picture, crop) in enumerate(zip(scan.pictures, crops))
             if (mask := mask_of(picture, subsets[picture.subset].masked_loss))}
    mask_paths = cache_masks(masks, cache_dir() / "masks", progress("cache latents"))
    views = [View(picture, crop) for picture, crop in zip(scan.pictures, crops)]
    mirrored = [index for index, picture in enumerate(scan.pictures)
                if subsets[picture.subset].flip and index not in held_out]
    vae_path = Path(plan.vae) if plan.vae else None
    paths = cache_latents(
        views + [views[index]._replace(mirrored=True) for index in mirrored],
        lambda: load_vae(base, vae_path, placement.encoder_dtype, placement.device),
        fingerprint(vae_path) if vae_path else base_sha256, precision, cache_dir() / "latents",
        tiled=plan.vae_tiling, on_progress=progress("cache latents"), device=placement.device,
        share=share,
    )
    prompt_paths = {}
    if not plan.text_encoders_learn:
        texts = caption_texts(captions, [subsets[picture.subset] for picture in scan.pictures], plan)
        events.emit("phase", phase="cache captions")
        prompt_paths = cache_texts([*texts, *texts_of(sample_prompts(plan)), ""], plan, base, base_sha256, placement,
                                   progress("cache captions"), share)
        if share == (0, 1):  # with several processes some entries may not be written yet
            events.emit("texts", num_texts=len(texts), num_bytes=sum(prompt_paths[text].stat().st_size for text in texts))
    return TrainingSet(scan.pictures, crops, captions, paths[: len(views)], prompt_paths, epoch, held_out, base_sha256, subsets,
                       dict(zip(mirrored, paths[len(views):])), mask_paths, plan.num_caption_variants, plan.seed)


def cache_texts(texts: list[str], plan: Plan, base: BaseModel, base_sha256: str, placement: Placement,
                on_progress: OnProgress, share: tuple[int, int] = (0, 1)) -> dict[str, Path]:
    """The base's own conditioning of the texts as the plan reads them; returns their cache entries."""
    return cache_prompts(
        texts, lambda device: load_text_encoders(base, placement.encoder_dtype, device),
        partial(encode_prompts, clip_skip=plan.clip_skip, max_token_length=plan.max_token_length),
        _text_fingerprint(base_sha256, plan), str(placement.encoder_dtype), cache_dir() / "prompts",
        on_progress=on_progress, device=placement.device, share=share,
    )


def caption_texts(captions: list[str], subsets: list[Subset], plan: Plan) -> list[str]:
    """Every text that a caption can be shown as, each once."""
    texts = {}
    for caption, subset in zip(captions, subsets):
        texts[plain_caption(caption, subset)] = None
        texts |= dict.fromkeys(caption_variant(caption, subset, number, plan.seed)
                               for number in range(plan.num_caption_variants if subset.captions_vary else 0))
    return list(texts)


def _text_fingerprint(base_sha256: str, plan: Plan) -> str:
    """What prompt entries depend on beside the prompt."""
    how = "" if (plan.clip_skip, plan.max_token_length) == (PENULTIMATE, CHUNK) else (
        f" clip_skip {plan.clip_skip} tokens {plan.max_token_length}")
    return base_sha256 + how


@lru_cache(NUM_ENTRIES_IN_MEMORY)
def load_entry(path: Path) -> dict[str, Tensor]:
    """A cache entry that is known to have been written."""
    entry = read_entry(path)
    if entry is None:
        raise CrumbError(f"The cache entry {path} was lost or damaged while training. `crumb resume` makes it again and "
                         f"goes on from the last checkpoint.")
    return entry


def caption_findings(pictures: list[Picture], subsets: list[Subset], max_token_length: int) -> list[str]:
    """How many captions are longer than what is read of them."""
    texts = {picture.path.name: plain_caption(training_caption(picture, subset), subset)
             for picture in pictures for subset in [subsets[picture.subset]]}
    may_be_cut = {name: text for name, text in texts.items() if len(text) > max_token_length}  # a token has a letter at least
    if not may_be_cut:
        return []
    tokenizer = make_tokenizers()[0]
    lengths = {name: len(token_ids(tokenizer, text)) for name, text in may_be_cut.items()}
    cut = {name: length for name, length in lengths.items() if length > max_token_length}
    if not cut:
        return []
    name, longest = max(cut.items(), key=lambda item: item[1])
    enough = next((length for length in (150, 225) if longest <= length), 225)
    mend = f" max_token_length = {enough} reads {'all' if longest <= enough else 'more'} of them." if (
        max_token_length < enough) else " Shorten them."
    return [f"{len(cut)} captions are longer than {max_token_length} tokens and cut there (longest: {name}, {longest}).{mend}"]


def _report_findings(plan: Plan, scan: Scan, subsets: list[Subset], epoch: Epoch, events: EventWriter) -> None:
    texts = [f"{problem.path.name}: {problem.text}" for problem in scan.problems]
    texts += bucket_findings(scan.pictures, epoch, plan.batch_size) + mask_findings(scan.pictures, subsets)
    texts += caption_findings(scan.pictures, subsets, plan.max_token_length)
    for text in texts:
        events.emit("warning", text=text)


def _report_pictures(pictures: list[Picture], crops: list[Crop], subsets: list[Subset], events: EventWriter) -> None:
    for picture, crop in zip(pictures, crops):
        subset = subsets[picture.subset]
        mask = mask_of(picture, subset.masked_loss)
        events.emit("picture", path=str(picture.path), size=[picture.width, picture.height],
                    bucket=[crop.width, crop.height], resized=[crop.resized_width, crop.resized_height],
                    crop=[crop.left, crop.top], cropped_share=round(crop.cropped_share, 4),
                    repeats=picture.repeats * subset.repeats, regularization=subset.regularization, flip=subset.flip,
                    mask=str(mask.path) if mask else None, loss_weight=subset.loss_weight)
        log.info("%s: %dx%d -> bucket %dx%d, resized to %dx%d, cut at left %d top %d, %.1f %% cut away", picture.path,
                 picture.width, picture.height, crop.width, crop.height, crop.resized_width, crop.resized_height,
                 crop.left, crop.top, 100 * crop.cropped_share)
