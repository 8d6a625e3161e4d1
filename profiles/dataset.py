"""What lies in a folder of pictures: which can be trained on, which can't and why, and each one's caption.

Separate from the engine because the wizard, the data-set doctor and the engine must see the very same set. Nothing
here changes a picture or a caption.
"""

import os
import random
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from crumb.profiles.errors import RequestError

if TYPE_CHECKING:
    from PIL import Image

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".gif")
CAPTION_SUFFIXES = (".txt", ".caption")
MIN_SIDE = 64
MAX_PIXELS = 300_000_000

# What a file holds decides, not its ending; formats that call outside programs (EPS) stay shut.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "AVIF", "GIF")
# Above this, pictures are decoded one at a time: several at once could fill a small machine's memory.
_HUGE_PIXELS = 40_000_000
# A folder "2024_holiday" names a year, not two thousand repeats.
_MAX_REPEATS = 999
_EXIF_ORIENTATION = 0x0112

_pillow_limit_lock = threading.Lock()
_huge_lock = threading.Lock()


@dataclass(frozen=True)
class Picture:
    """One usable picture. `width` and `height` are pixels as shown, after EXIF rotation."""

    path: Path
    width: int
    height: int
    repeats: int
    caption: str | None
    caption_path: Path | None


@dataclass(frozen=True)
class Problem:
    """What is wrong with one file and how to mend it. `fatal`: the picture cannot be used."""

    path: Path
    text: str
    fatal: bool


@dataclass(frozen=True)
class Scan:
    """The pictures that can be used and all that was found wrong, both in natural order of path."""

    folder: Path
    pictures: list[Picture]
    problems: list[Problem]


@dataclass(frozen=True)
class _Found:
    path: Path
    repeats: int
    caption_path: Path | None


class PictureTooLarge(ValueError):
    """More pixels than any photograph has: a decompression bomb, or a scan that must be scaled down first."""


def scan_pictures(folder: str | Path, on_progress: Callable[[int, int], None] | None = None) -> Scan:
    """Lists and fully decodes every picture below `folder`.

    Raises RequestError when the folder is missing, is a file, or holds no picture that can be used. `on_progress`
    gets (done, total) from the calling thread.
    """
    folder = Path(os.path.abspath(Path(folder).expanduser()))
    if folder.is_file():
        raise RequestError(f'"{folder}" is a file. Give the folder that holds the pictures: "{folder.parent}"?')
    if not folder.is_dir():
        raise RequestError(f'There is no folder "{folder}". Give the folder that holds your pictures.')
    problems: list[Problem] = []
    # A link to a folder above would bring in everything that lies beside this one.
    above = {str(parent) for parent in Path(os.path.realpath(folder)).parents}
    found = list(_walk(folder, 1, problems, seen=above))
    pictures = []
    workers = min(8, os.cpu_count() or 1)
    with warnings.catch_warnings(), ThreadPoolExecutor(workers) as pool:
        # Pillow's remarks on odd metadata would otherwise be printed across the wizard's screen.
        warnings.simplefilter("ignore")
        try:
            for done, (picture, found_wrong) in enumerate(pool.map(_examine, found), start=1):
                problems += found_wrong
                if picture:
                    pictures.append(picture)
                if on_progress:
                    on_progress(done, len(found))
        except BaseException:  # a person who stops the scan should not wait for the pictures still queued
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    problems.sort(key=lambda problem: _natural_key(problem.path))
    if not pictures:
        raise RequestError(_nothing_usable(folder, problems))
    return Scan(folder, sorted(pictures, key=lambda picture: _natural_key(picture.path)), problems)


def caption_for(picture: Picture, trigger: str, class_word: str) -> str:
    """The prompt a picture is trained with: its caption, led by the trigger word unless it already holds it."""
    trigger = trigger.strip()
    if not picture.caption:
        return f"{trigger} {class_word.strip()}".strip()
    if not trigger or re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", picture.caption, re.IGNORECASE):
        return picture.caption
    return f"{trigger}, {picture.caption}"


def held_out_indices(num_pictures: int, num_held_out: int, seed: int) -> list[int]:
    """Which pictures are kept from training, in order. RequestError where none would be left to train on."""
    if num_held_out >= num_pictures:
        raise RequestError(f"held_out_pictures is {num_held_out} of {num_pictures} pictures: none is left to train on. "
                           f"Set it to {num_pictures // 10} or so; 0 holds none out.")
    return sorted(random.Random(f"crumb held out {seed}").sample(range(num_pictures), num_held_out))


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


def _walk(folder: Path, repeats: int, problems: list[Problem], seen: set[str]) -> Iterator[_Found]:
    """Picture files below `folder`; every real file and folder once, whatever the links."""
    real_folder = os.path.realpath(folder)
    if real_folder in seen:
        return
    seen.add(real_folder)
    try:
        names = sorted(os.listdir(folder), key=lambda name: _natural_key(Path(name)))
    except OSError as error:
        problems.append(Problem(folder, f"The folder can't be opened ({error.strerror}). Mend its permissions.", True))
        return
    captions = {(Path(name).stem, Path(name).suffix.lower()): name for name in names}
    for name in names:
        path = folder / name
        if name.startswith("."):
            continue
        if path.is_dir():
            below = _repeats_below(path, repeats, problems)
            if below:
                yield from _walk(path, below, problems, seen)
        elif path.suffix.lower() in PICTURE_SUFFIXES:
            if not path.is_file():
                problems.append(Problem(path, "It is a link that leads nowhere, or no regular file. Remove it.", True))
                continue
            real_path = os.path.realpath(path)
            if real_path not in seen:
                seen.add(real_path)
                beside = (captions.get((path.stem, suffix)) for suffix in CAPTION_SUFFIXES)
                caption_name = next(filter(None, beside), None)
                yield _Found(path, repeats, folder / caption_name if caption_name else None)


def _repeats_below(folder: Path, repeats: int, problems: list[Problem]) -> int:
    """Repeats of what a sub-folder holds; kohya's `N_name` says N, 0 leaves the folder out."""
    match = re.match(r"([0-9]+)_", folder.name)
    if not match:
        return repeats
    number = int(match[1])
    if number == 0:
        problems.append(Problem(folder, "Its name asks for 0 repeats, so its pictures are left out.", False))
    elif number > _MAX_REPEATS:
        text = f"{number} in its name is no number of repeats (1 to {_MAX_REPEATS}); its pictures count as before."
        problems.append(Problem(folder, text, False))
        return repeats
    return number


def _examine(found: _Found) -> tuple[Picture | None, list[Problem]]:
    try:
        width, height, remark = _decode(found.path)
    # Damaged files make Pillow's decoders raise nearly anything, from SyntaxError to struct.error.
    except Exception as error:
        return None, [Problem(found.path, _why_unreadable(error), True)]
    if min(width, height) < MIN_SIDE:
        text = f"It is {width} x {height} pixels; each side needs at least {MIN_SIDE}. Use a larger picture."
        return None, [Problem(found.path, text, True)]
    problems = [Problem(found.path, remark, False)] if remark else []
    caption = None
    if found.caption_path:
        caption, wrong = _read_caption(found.caption_path)
        if wrong:
            problems.append(Problem(found.caption_path, wrong, False))
    return Picture(found.path, width, height, found.repeats, caption, found.caption_path), problems


def _decode(path: Path) -> tuple[int, int, str | None]:
    """Decodes the whole file. Returns width and height as shown, and a remark on animations."""
    with open_picture(path) as image:
        animated = image.format in ("GIF", "WEBP", "PNG", "AVIF") and getattr(image, "n_frames", 1) > 1
        width, height = image.size
        with _huge_lock if width * height > _HUGE_PIXELS else nullcontext():
            # An eighth of the size still reads every byte of a JPEG, at a third of the time.
            image.draft("RGB", (width // 8, height // 8))
            image.load()
        # Pillow turns TIFFs by itself while loading, and then drops the tag.
        if image.format == "TIFF":
            width, height = image.size
        elif _is_turned(image):
            width, height = height, width
    return width, height, "It is animated: its first frame is used." if animated else None


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


def _natural_key(path: Path) -> tuple:
    """Sorts `2.png` before `10.png`; digits and text alternate, so keys always compare."""
    parts = [
        [int(chunk) if index % 2 else chunk for index, chunk in enumerate(re.split(r"([0-9]+)", part.casefold()))]
        for part in path.parts
    ]
    return parts, str(path)


def _nothing_usable(folder: Path, problems: list[Problem]) -> str:
    fatal = [problem for problem in problems if problem.fatal]
    if not fatal:
        endings = ", ".join(suffix[1:] for suffix in PICTURE_SUFFIXES)
        return f'There is no picture in "{folder}" or below it. Put pictures there ({endings}) or give another folder.'
    shown = "; ".join(f"{problem.path.name}: {problem.text}" for problem in fatal[:3])
    return f'None of the {len(fatal)} pictures in "{folder}" can be used. {shown}'
