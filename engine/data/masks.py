"""Where the loss counts: a picture's alpha channel or mask file, cut and scaled as its picture, at the size of latents."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from crumb.engine.data.caches import OnProgress, entry_path, mask_key, read_entry, write_entry
from crumb.engine.data.images import crop_picture, decode_mask, read_bytes
from crumb.profiles.buckets import Crop
from crumb.profiles.errors import RequestError
from crumb.profiles.pictures import Mask

PIXELS_PER_LATENT = 8


def mask_tensor(image: Image.Image, crop: Crop) -> Tensor:
    """(1, height / 8, width / 8) fp32 from 0 to 1: the share of white in what each latent value stands for.

    Boxes, not Lanczos as for pictures: a weight must not ring beyond black and white.
    """
    pixels = torch.from_numpy(np.array(crop_picture(image, crop, Image.Resampling.BOX), dtype=np.float32))
    return F.avg_pool2d(pixels[None] / 255, PIXELS_PER_LATENT)


def cache_masks(masks: Mapping[int, tuple[Mask, Crop]], folder: Path, on_progress: OnProgress) -> dict[int, Path]:
    """Each mask's entry, by the index it has in `masks`; what is not cached yet is made.

    Entries are of their own, named by the bytes that hold the mask, so that a mask painted anew encodes no picture anew.
    RequestError where the part that is trained has no white.
    """
    paths = {}
    for index, (mask, crop) in masks.items():
        data = read_bytes(mask.path)
        paths[index] = entry_path(folder, mask_key(hashlib.sha256(data).hexdigest(), mask.kind, crop))
        entry = read_entry(paths[index])
        if entry is None:
            entry = {"mask": mask_tensor(decode_mask(data, mask.path, mask.kind), crop)}
            write_entry(paths[index], entry)
        if not entry["mask"].any():
            raise RequestError(
                f'The mask "{mask.path}" is black in all of the picture that is trained ({crop.width} x {crop.height} of '
                f"{crop.resized_width} x {crop.resized_height} pixels): nothing would be learned. Crop the picture to what "
                f"its mask shows, or leave it out.")
        on_progress(len(paths), len(masks))
    return paths
