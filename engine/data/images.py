"""From a picture file to the tensor that the VAE encodes.

All that is odd about files on disk (rotation, alpha, palettes, 16 bits, colour profiles, animations) ends here:
everything after sees 8-bit sRGB.
"""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps

from crumb.profiles.buckets import Crop
from crumb.profiles.errors import CrumbError
from crumb.profiles.pictures import DEEP_MODES, alpha_channel, mask_channel, open_picture

_SRGB = ImageCms.createProfile("sRGB")
_MODE_OF_COLOR_SPACE = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}


def read_bytes(path: Path) -> bytes:
    """A picture's file. Raises CrumbError that names it when it has gone since the folder was scanned."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise CrumbError(
            f'The picture "{path}" was there when the folder was scanned but can\'t be read now '
            f"({error.strerror}). Put it back, or plan again without it."
        ) from error


def decode_rgb(data: bytes, path: Path) -> Image.Image:
    """The picture in `data` as 8-bit sRGB, upright, on white, first frame. `path` only names it in errors."""
    return _decode(data, path, _to_srgb)


def decode_mask(data: bytes, path: Path, kind: str) -> Image.Image:
    """The mask in `data` as 8-bit grey, upright: the alpha channel of a picture, or the greys of a mask file."""
    return _decode(data, path, _grey_of_alpha if kind == "alpha" else _grey_of_mask)


def _decode(data: bytes, path: Path, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    try:
        with open_picture(io.BytesIO(data)) as image:
            image.load()
            return convert(_upright(image))
    # Damaged files make Pillow's decoders raise nearly anything, from SyntaxError to struct.error.
    except Exception as error:
        raise CrumbError(
            f'The picture "{path}" can\'t be decoded ({error}). It was whole when the folder was scanned: '
            "copy it again, or plan again without it."
        ) from error


def load_rgb(path: Path) -> Image.Image:
    """The picture at `path` as 8-bit sRGB, upright, on white. Raises CrumbError that names it."""
    return decode_rgb(read_bytes(path), path)


def crop_picture(image: Image.Image, crop: Crop, resampling=Image.Resampling.LANCZOS) -> Image.Image:
    """Resizes (Pillow widens its filters to the scale, so nothing aliases) and cuts the bucket out."""
    if image.size != (crop.resized_width, crop.resized_height):
        image = image.resize((crop.resized_width, crop.resized_height), resampling)
    return image.crop((crop.left, crop.top, crop.left + crop.width, crop.top + crop.height))


def to_tensor(image: Image.Image) -> torch.Tensor:
    """An RGB picture as (3, H, W) fp32 in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image, dtype=np.float32))
    return (pixels / 127.5 - 1).permute(2, 0, 1).contiguous()


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # broken metadata says nothing about the picture; the scan counts it as upright too
        return image


def _to_srgb(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    if image.mode in DEEP_MODES:
        image = _eight_bit_grey(image)
    alpha = None
    if image.has_transparency_data:
        if image.mode == "La":
            image = image.convert("LA")
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        image = image.convert("RGB")
    elif image.mode not in ("RGB", "L", "CMYK", "LAB"):
        image = image.convert("RGB")
    rgb = _apply_profile(image, profile).convert("RGB")
    if alpha is None:
        return rgb
    on_white = Image.new("RGB", rgb.size, "white")
    on_white.paste(rgb, mask=alpha)
    return on_white


def _grey_of_alpha(image: Image.Image) -> Image.Image:
    return alpha_channel(image) or Image.new("L", image.size, "white")


def _grey_of_mask(image: Image.Image) -> Image.Image:
    grey = mask_channel(image)
    return _eight_bit_grey(grey) if grey.mode in DEEP_MODES else grey


def _eight_bit_grey(image: Image.Image) -> Image.Image:
    """Scales 16-bit, 32-bit and float greys to 0..255, which Pillow's own convert would clip."""
    values = np.asarray(image).astype(np.float64)
    values = np.where(np.isfinite(values), values, 0)
    low, high = float(values.min()), float(values.max())
    # In 32-bit files nothing says what white is: the smallest range in use that holds every value, else their own.
    whites = {"I": (255.0, 65535.0), "F": (1.0, 255.0, 65535.0)}.get(image.mode, (65535.0,))
    if low >= 0 and high <= whites[-1]:
        low, high = 0.0, next(white for white in whites if high <= white)
    values = (values - low) * (255.0 / max(high - low, 1e-12))
    return Image.fromarray(np.rint(values.clip(0, 255)).astype(np.uint8))


def _apply_profile(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Converts to sRGB by the embedded profile; a profile that is broken or of another colour space is ignored."""
    try:
        if image.mode == "LAB":
            return ImageCms.profileToProfile(image, ImageCms.createProfile("LAB"), _SRGB, outputMode="RGB")
        if not profile:
            return image
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if _MODE_OF_COLOR_SPACE.get(source.profile.xcolor_space.strip()) != image.mode:
            return image
        return ImageCms.profileToProfile(image, source, _SRGB, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return image
