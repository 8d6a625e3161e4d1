"""What the VAE and the text encoders make of pictures and prompts, kept on disk and shared by all runs.

An entry's name is the hash of everything that its content depends on, so an entry is never stale: it is whole, or it
is made again. Each carries a checksum, because machines that lose power leave torn files behind.
"""

import hashlib
import json
import logging
import os
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from crumb.engine.data.images import crop_picture, decode_rgb, read_bytes, to_tensor
from crumb.engine.faults import fault
from crumb.engine.memory.placement import free_memory
from crumb.engine.model.load import tile_vae
from crumb.profiles.buckets import Crop
from crumb.profiles.errors import CrumbError
from crumb.profiles.pictures import Picture

log = logging.getLogger("crumb")

CACHE_FORMAT = 1
"""Part of every key: raise it when pictures or prompts are prepared differently, and old entries are left alone."""

OnProgress = Callable[[int, int], None]


class View(NamedTuple):
    """What of a picture is encoded, and whether it is mirrored first: a VAE is not symmetric, so latents can't be."""

    picture: Picture
    crop: Crop
    mirrored: bool = False


def latents_key(image_bytes_sha256: str, crop: Crop, vae_fingerprint: str, precision: str, tiled: bool = False,
                mirrored: bool = False) -> str:
    """The name of a picture's latents. Tiling is part of it: blended tiles are not bit for bit the whole picture."""
    parts: dict[str, Any] = {"image": image_bytes_sha256, "crop": asdict(crop), "vae": vae_fingerprint}
    if mirrored:  # named only then, so that entries from before there was mirroring keep their names
        parts["mirrored"] = True
    return _key(kind="latents", precision=precision, tiled=tiled, **parts)


def mask_key(mask_bytes_sha256: str, kind: str, crop: Crop) -> str:
    """The name of a mask at latent size; `kind` says which part of the file it is."""
    return _key(kind="mask", mask=mask_bytes_sha256, channel=kind, crop=asdict(crop))


def prompt_key(prompt: str, text_encoder_fingerprint: str, precision: str) -> str:
    """The name of a prompt's embeddings."""
    return _key(kind="prompt", prompt=prompt, text_encoders=text_encoder_fingerprint, precision=precision)


def _key(**parts: Any) -> str:
    canonical = json.dumps({"format": CACHE_FORMAT, **parts}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def entry_path(folder: Path, key: str) -> Path:
    """Where an entry lies: two levels, so that no folder grows to many thousand files."""
    return Path(folder) / key[:2] / f"{key[2:]}.safetensors"


def write_entry(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes an entry whole or not at all: aside, fsynced, then renamed. Raises CrumbError when the disk refuses."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = save(contiguous, metadata={"sha256": _checksum(save(contiguous))})
    try:
        for folder in (path.parent.parent, path.parent):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, aside = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        except BaseException:
            os.unlink(aside)
            raise
    except OSError as error:
        raise CrumbError(
            f'The cache entry "{path}" could not be written ({error.strerror}). Free some space there, or point '
            "XDG_CACHE_HOME to another disk; what is already cached is kept."
        ) from error


def read_entry(path: Path) -> dict[str, torch.Tensor] | None:
    """An entry's tensors on the CPU, or None when it is missing, torn or changed; a bad one is deleted."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        if _header(data)["__metadata__"]["sha256"] == _checksum(data):
            return load(data)
    except (ValueError, KeyError, TypeError, struct.error, SafetensorError):
        pass
    path.unlink(missing_ok=True)
    return None


def _header(data: bytes) -> dict:
    """The JSON head of a safetensors file: its length as 8 bytes, then the text."""
    (length,) = struct.unpack_from("<Q", data)
    return json.loads(data[8 : 8 + length])


def _checksum(data: bytes) -> str:
    """SHA-256 over names, dtypes, shapes and values of a safetensors file; its metadata are left out."""
    header = _header(data)
    header.pop("__metadata__", None)
    (length,) = struct.unpack_from("<Q", data)
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    digest.update(memoryview(data)[8 + length :])
    return digest.hexdigest()


def cache_latents(
    views: Sequence[View],
    load_vae: Callable[[], Any],
    fingerprint: str,
    precision: str,
    folder: Path,
    *,
    batch_size: int = 1,
    tiled: bool,
    on_progress: OnProgress,
    device: torch.device | str,
    share: tuple[int, int] = (0, 1),
) -> list[Path]:
    """Encodes what is not cached yet; returns one entry's path per view, in order.

    With share (r, n) it is every n-th entry from the r-th on that is looked at and encoded; n processes do the others.

    An entry holds the posterior's `mean` and `std`, each (4, height / 8, width / 8) fp32 and not yet multiplied by
    the VAE's scaling factor, so a fresh sample is (mean + std * noise) * scaling_factor. `load_vae` is called only if
    something is missing; its VAE keeps its dtype and is freed before this returns. Raises CrumbError that names the
    picture when one has changed since the scan or its latents are not finite.
    """
    paths: list[Path] = []
    digests: dict[Path, str] = {}
    missing: dict[Path, tuple[View, str]] = {}
    numbers: dict[Path, int] = {}
    for view in views:
        file = view.picture.path
        if file not in digests:
            digests[file] = hashlib.sha256(read_bytes(file)).hexdigest()
        path = entry_path(folder, latents_key(digests[file], view.crop, fingerprint, precision, tiled, view.mirrored))
        paths.append(path)
        # By its place among all, not among the missing ones: those change while the other processes work.
        is_mine = numbers.setdefault(path, len(numbers)) % share[1] == share[0]
        if is_mine and path not in missing and read_entry(path) is None:
            missing[path] = (view, digests[file])
        on_progress(len(paths) - len(missing), len(views))
    if missing:
        done = len(paths) - len(missing)
        vae = load_vae().to(device)
        if tiled:
            tile_vae(vae)
        for batch_paths, pictures, pixels in _prefetched(_batches(missing, batch_size)):
            vae = _encode(vae, batch_paths, pictures, pixels)
            done += len(batch_paths)
            on_progress(done, len(paths))
        del vae
        free_memory()
    return paths


def _batches(missing: Mapping[Path, tuple[View, str]], batch_size: int) -> list[list[tuple[Path, View, str]]]:
    """Pictures of one bucket per batch, larger buckets first: what doesn't fit shows at once."""
    buckets: dict[tuple[int, int], list[tuple]] = {}
    for path, (view, digest) in missing.items():
        buckets.setdefault((view.crop.width, view.crop.height), []).append((path, view, digest))
    largest_first = sorted(buckets, key=lambda size: (-size[0] * size[1], size))
    return [
        buckets[size][start : start + batch_size]
        for size in largest_first
        for start in range(0, len(buckets[size]), batch_size)
    ]


def _prefetched(batches: list[list[tuple]]) -> Iterator[tuple[list[Path], list[Path], torch.Tensor]]:
    """Yields (entry paths, picture paths, pixels); the next batch is decoded while the VAE works on this one."""
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(_load_batch, batches[0])
        for following in [*batches[1:], None]:
            loaded = ahead.result()
            if following:
                ahead = pool.submit(_load_batch, following)
            yield loaded


def _load_batch(batch: list[tuple[Path, View, str]]) -> tuple[list[Path], list[Path], torch.Tensor]:
    pixels = []
    for _, (picture, crop, mirrored), digest in batch:
        data = read_bytes(picture.path)
        image = decode_rgb(data, picture.path)
        changed = hashlib.sha256(data).hexdigest() != digest
        if changed or image.size != (picture.width, picture.height):
            raise CrumbError(
                f'The picture "{picture.path}" changed since the folder was scanned: it was {picture.width} x '
                f"{picture.height} pixels and is {image.width} x {image.height} now. Start again to scan it anew."
            )
        tensor = to_tensor(crop_picture(image, crop))
        pixels.append(tensor.flip(-1) if mirrored else tensor)
    return [path for path, _, _ in batch], [view.picture.path for _, view, _ in batch], torch.stack(pixels)


def _encode(vae: Any, paths: list[Path], pictures: list[Path], pixels: torch.Tensor) -> Any:
    """Writes the entries; on the processor where the GPU has no room. Returns the VAE, which then has moved there for good."""
    try:
        fault("cache latents")
        _write_latents(vae, paths, pictures, pixels)
        return vae
    except torch.OutOfMemoryError:
        log.warning("no room on the GPU to encode pictures: encoding them on the processor")
    vae = vae.to("cpu", torch.float32)
    free_memory()
    _write_latents(vae, paths, pictures, pixels)
    return vae


@torch.no_grad()
def _write_latents(vae: Any, paths: list[Path], pictures: list[Path], pixels: torch.Tensor) -> None:
    posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
    means, stds = posterior.mean.float().cpu(), posterior.std.float().cpu()
    for path, picture, mean, std in zip(paths, pictures, means, stds, strict=True):
        if not (mean.isfinite().all() and std.isfinite().all()):
            raise CrumbError(
                f'The VAE gave values that are no numbers for "{picture}" in {_dtype_name(vae.dtype)}. SDXL\'s own VAE '
                "overflows in float16: use bfloat16 or float32 for it, or a base model with the fp16-fixed VAE. "
                "If this is the only such picture, leave it out."
            )
        write_entry(path, {"mean": mean, "std": std})


def cache_prompts(
    prompts: Sequence[str],
    load_text_encoders: Callable[[torch.device | str], Any],
    encode: Callable[[Any, list[str]], tuple[torch.Tensor, torch.Tensor]],
    fingerprint: str,
    precision: str,
    folder: Path,
    *,
    on_progress: OnProgress,
    device: torch.device | str,
    share: tuple[int, int] = (0, 1),
) -> dict[str, Path]:
    """Encodes the prompts that are not cached yet; returns each distinct prompt's entry. `share` as in `cache_latents`.

    An entry holds `encoder_hidden_states` (77, D) and `pooled` (P,) in the dtype that `encode` gives; `encode` gets
    one prompt at a time, so that an entry never depends on its company. The text encoders are loaded only if
    something is missing, on the processor where the device has no room, and freed before this returns. Raises CrumbError
    that names the prompt.
    """
    paths = {prompt: entry_path(folder, prompt_key(prompt, fingerprint, precision)) for prompt in prompts}
    missing = [prompt for prompt, path in list(paths.items())[share[0]::share[1]] if read_entry(path) is None]
    done = len(paths) - len(missing)
    on_progress(done, len(paths))

    def encode_rest(device: torch.device | str) -> None:
        nonlocal done
        text_encoders = load_text_encoders(device)
        while missing:
            with torch.no_grad():
                hidden, pooled = encode(text_encoders, [missing[0]])
            if not (hidden.isfinite().all() and pooled.isfinite().all()):
                raise CrumbError(
                    f'The text encoders gave values that are no numbers for the prompt "{missing[0]}" in '
                    f"{_dtype_name(hidden.dtype)}. Use bfloat16 or float32 for them, or check the base model's file."
                )
            write_entry(paths[missing.pop(0)], {"encoder_hidden_states": hidden[0], "pooled": pooled[0]})
            done += 1
            on_progress(done, len(paths))

    if missing:
        try:
            fault("cache captions")
            encode_rest(device)
        except torch.OutOfMemoryError:
            log.warning("no room on the GPU for the text encoders: captions are encoded on the processor")
        free_memory()
        if missing:
            encode_rest("cpu")
            free_memory()
    return paths


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
