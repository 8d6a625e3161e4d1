"""One picture file: whether it can be used, its size as shown, its caption and its masks.

Nothing here changes a file. Pillow is imported only where a file is opened, so that the wizard starts at once.
"""

import threading
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from PIL import Image

MIN_SIDE = 64
MAX_PIXELS = 300_000_000
MAX_STRETCH = 0.02
"""How far a mask's shape may be from its picture's: masks made at an eighth of the size are rounded."""

DEEP_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
"""Pillow's greys of more than 8 bits, which its own convert would clip."""

# What a file holds decides, not its ending; formats that call outside programs (EPS) stay shut.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "AVIF", "GIF")
# Above this, pictures are decoded one at a time: several at once could fill a small machine's memory.
_HUGE_PIXELS = 40_000_000
_EXIF_ORIENTATION = 0x0112

_pillow_limit_lock = threading.Lock()
_huge_lock = threading.Lock()


@dataclass(frozen=True)
class Mask:
    """Where a picture's loss may count. `kind` is a value of masked_loss; `fault` says why it can't be used, or ""."""

    kind: str
    path: Path
    fault: str = ""


@dataclass(frozen=True)
class Picture:
    """One usable picture. `width` and `height` are pixels as shown, after EXIF rotation.

    `masks` are all that were found, whether the plan asks for them or not; `subset` is an index into its subsets.
    """

    path: Path
    width: int
    height: int
    repeats: int
    caption: str | None
    caption_path: Path | None
    masks: tuple[Mask, ...] = ()
    subset: int = 0


@dataclass(frozen=True)
class Problem:
    """What is wrong with one file and how to mend it. `fatal`: the picture cannot be used."""

    path: Path
    text: str
    fatal: bool


@dataclass(frozen=True)
class Found:
    """A picture file and what lies beside it, not opened yet."""

    path: Path
    repeats: int
    caption_path: Path | None
    mask_path: Path | None


class PictureTooLarge(ValueError):
    """More pixels than any photograph has: a decompression bomb, or a scan that must be scaled down first."""


def open_picture(source: Path | BinaryIO) -> "Image.Image":
    """Opens a picture's header with Pillow. Raises PictureTooLarge above MAX_PIXELS, else whatever Pillow raises."""
    from PIL import Image

    # Pillow warns from 89 megapixels and refuses from 179, which good scans reach; the limit here is our own.
    with _pillow_limit_lock:
        pillow_limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            image = Image.open(source, formats=_FORMATS)
        finally:
            Image.MAX_IMAGE_PIXELS = pillow_limit
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise PictureTooLarge(
            f"It claims {image.width} x {image.height} pixels; at most {MAX_PIXELS // 1_000_000} megapixels are "
            "opened. Scale it down, or remove it if you don't know where it came from."
        )
    return image


def mask_of(picture: Picture, masked_loss: str) -> Mask | None:
    """The picture's mask of the wanted kind."""
    return next((mask for mask in picture.masks if mask.kind == masked_loss), None)


def alpha_channel(image: "Image.Image") -> "Image.Image | None":
    """A loaded picture's alpha as 8-bit grey, whatever way it is stored; None without one."""
    if not image.has_transparency_data:
        return None
    if image.mode == "La":  # the one way that Pillow converts it
        image = image.convert("LA")
    return (image if image.mode in ("LA", "RGBA") else image.convert("RGBA")).getchannel("A")


def mask_channel(image: "Image.Image") -> "Image.Image":
    """A mask file's greys, 8-bit or of DEEP_MODES; a mask painted on nothing is black where there is nothing."""
    from PIL import Image

    alpha = alpha_channel(image)
    if alpha is None:
        return image if image.mode in DEEP_MODES else image.convert("L")
    on_black = Image.new("L", image.size)
    on_black.paste(image.convert("RGBA").convert("L"), mask=alpha)
    return on_black


def examine(found: Found) -> tuple[Picture | None, list[Problem]]:
    """Decodes a picture and reads what lies beside it; None with the problem that makes it unusable."""
    path = found.path
    try:
        width, height, remark, alpha = _decode(path)
    # Damaged files make Pillow's decoders raise nearly anything, from SyntaxError to struct.error.
    except Exception as error:
        return None, [Problem(path, _why_unreadable(error), True)]
    if min(width, height) < MIN_SIDE:
        text = f"It is {width} x {height} pixels; each side needs at least {MIN_SIDE}. Use a larger picture."
        return None, [Problem(path, text, True)]
    problems = [Problem(path, remark, False)] if remark else []
    caption = None
    if found.caption_path:
        caption, wrong = _read_caption(found.caption_path)
        if wrong:
            problems.append(Problem(found.caption_path, wrong, False))
    masks = [Mask("alpha", path, _fault_of_alpha(alpha))] if alpha else []
    if found.mask_path:
        masks.append(Mask("files", found.mask_path, _fault_of_file(found.mask_path, width / height)))
    return Picture(path, width, height, found.repeats, caption, found.caption_path, tuple(masks)), problems


def _decode(path: Path) -> tuple[int, int, str | None, tuple[int, int] | None]:
    """Decodes the whole file. Returns width and height as shown, a remark on animations, and alpha's lowest and highest."""
    with open_picture(path) as image:
        animated = image.format in ("GIF", "WEBP", "PNG", "AVIF") and getattr(image, "n_frames", 1) > 1
        width, height = image.size
        with _huge_lock if width * height > _HUGE_PIXELS else nullcontext():
            # An eighth of the size still reads every byte of a JPEG, at a third of the time.
            image.draft("RGB", (width // 8, height // 8))
            image.load()
            channel = alpha_channel(image)
            alpha = channel.getextrema() if channel else None
        # Pillow turns TIFFs by itself while loading, and then drops the tag.
        if image.format == "TIFF":
            width, height = image.size
        elif _is_turned(image):
            width, height = height, width
    if alpha == (255, 255):  # solid all over, it masks nothing
        alpha = None
    return width, height, "It is animated: its first frame is used." if animated else None, alpha


def _fault_of_alpha(alpha: tuple[int, int]) -> str:
    return "It is transparent all over, and alpha is the mask: nothing of it would be learned" if alpha[1] == 0 else ""


def _fault_of_file(path: Path, aspect: float) -> str:
    try:
        with open_picture(path) as image:
            image.load()
            width, height = image.size
            if image.format != "TIFF" and _is_turned(image):
                width, height = height, width
            if mask_channel(image).getextrema()[1] == 0:
                return "The mask is black all over: nothing would be learned. Paint white what is to be, or delete it."
    except Exception as error:
        return f"The mask can't be used. {_why_unreadable(error)}"
    if abs(width / height / aspect - 1) > MAX_STRETCH:
        return f"The mask is {width} x {height} pixels, another shape than its picture. Make it anew from the picture."
    return ""


def _is_turned(image: "Image.Image") -> bool:
    try:
        return image.getexif().get(_EXIF_ORIENTATION) in (5, 6, 7, 8)
    except Exception:  # broken metadata says nothing about the picture, and raises nearly anything
        return False


def _why_unreadable(error: Exception) -> str:
    from PIL import UnidentifiedImageError

    if isinstance(error, PictureTooLarge):
        return str(error)
    if isinstance(error, PermissionError):
        return "It may not be read. Mend its permissions."
    if isinstance(error, UnidentifiedImageError):
        return "It is no picture that can be read, whatever its ending says. Save it again as PNG or JPEG."
    if isinstance(error, MemoryError):
        return "It is too large for the memory of this machine. Scale it down."
    return f"It is damaged or cut short ({error}). Copy or download it again."


def _read_caption(path: Path) -> tuple[str | None, str | None]:
    """Returns (caption, problem); one of them is None."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        return None, f"The caption can't be read ({error.strerror}). Mend its permissions."
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        return None, "The caption is not UTF-8 text, so it is left out. Save it again as UTF-8."
    caption = " ".join(line.strip() for line in text.splitlines() if line.strip())
    if not caption:
        return None, "The caption is empty. Write one, or delete the file."
    return caption, None
