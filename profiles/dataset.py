"""What lies in a folder of pictures: which can be trained on, which can't and why, and each one's caption.

Separate from the engine because the wizard, the data-set doctor and the engine must see the very same set. Nothing
here changes a picture or a caption.
"""

import os
import random
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from crumb.profiles.captions import holds_word
from crumb.profiles.errors import RequestError
from crumb.profiles.pictures import Found, Picture, Problem, examine, mask_of
from crumb.profiles.subsets import Subset

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".gif")
CAPTION_SUFFIXES = (".txt", ".caption")
MASK_ENDING = "-masklabel.png"
"""OneTrainer's name for the mask of NAME: NAME-masklabel.png. Such a file is never a training picture."""

# A folder "2024_holiday" names a year, not two thousand repeats.
_MAX_REPEATS = 999


@dataclass(frozen=True)
class Scan:
    """The pictures that can be used and all that was found wrong, both in natural order of path.

    A scan of several folders keeps each folder's own in `parts`, and names the first as its folder.
    """

    folder: Path
    pictures: list[Picture]
    problems: list[Problem]
    parts: tuple["Scan", ...] = ()


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
            for done, (picture, found_wrong) in enumerate(pool.map(examine, found), start=1):
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


def scan_subsets(subsets: Sequence[Subset], known: Scan | None = None,
                 on_progress: Callable[[int, int], None] | None = None) -> Scan:
    """The pictures of all folders as one scan, subset after subset, each picture with the subset it belongs to.

    `known` spares a second look at the folders it holds. RequestError as of scan_pictures, and where a subset adds
    nothing or nothing is left to learn from.
    """
    parts = _parts(subsets, known, on_progress)
    # A problem of a folder within another is found twice.
    problems = list(dict.fromkeys(problem for part in parts for problem in part.problems))
    owners, num_shared = _owners(parts)
    if num_shared:
        text = f"{num_shared} of its pictures lie in another of the folders too; each counts once, for the innermost folder."
        problems.append(Problem(parts[0].folder, text, False))
    pictures = []
    for index, (subset, part) in enumerate(zip(subsets, parts)):
        own = [picture for picture in part.pictures if owners[os.path.realpath(picture.path)] == index]
        if index and not own:
            raise RequestError(f'Every picture in "{part.folder}" lies in another of the folders as well. Give that subset a '
                               f"folder of its own, or leave it out.")
        faults = {picture.path: mask for picture in own if (mask := mask_of(picture, subset.masked_loss)) and mask.fault}
        problems += [Problem(mask.path, mask.fault, True) for mask in faults.values()]
        pictures += [replace(picture, subset=index) for picture in own if picture.path not in faults]
    if all(subsets[picture.subset].regularization for picture in pictures):
        raise RequestError(_nothing_usable(parts[0].folder, problems))
    return Scan(parts[0].folder, pictures, problems, tuple(parts))


def mask_findings(pictures: Sequence[Picture], subsets: Sequence[Subset]) -> list[str]:
    """What is to be said where masks are wanted and some pictures have none."""
    wanted = [picture for picture in pictures if subsets[picture.subset].masked_loss != "off"]
    without = [picture for picture in wanted if not mask_of(picture, subsets[picture.subset].masked_loss)]
    if not without:
        return []
    return [f"{len(without)} of {len(wanted)} pictures that should have a mask have none (first: {without[0].path.name}); "
            f"they are trained whole."]


def caption_for(picture: Picture, trigger: str, class_word: str) -> str:
    """The prompt a picture is trained with: its caption, led by the trigger word unless it already holds it."""
    trigger = trigger.strip()
    if not picture.caption:
        return f"{trigger} {class_word.strip()}".strip()
    if not trigger or holds_word(picture.caption, trigger):
        return picture.caption
    return f"{trigger}, {picture.caption}"


def training_caption(picture: Picture, subset: Subset) -> str:
    """The picture's prompt by the settings of its subset; regularization pictures have no trigger word there."""
    return caption_for(picture, subset.trigger, subset.class_word)


def held_out_indices(num_pictures: int, num_held_out: int, seed: int) -> list[int]:
    """Which pictures are kept from training, in order. RequestError where none would be left to train on."""
    if num_held_out >= num_pictures:
        raise RequestError(f"held_out_pictures is {num_held_out} of {num_pictures} pictures: none is left to train on. "
                           f"Set it to {num_pictures // 10} or so; 0 holds none out.")
    return sorted(random.Random(f"crumb held out {seed}").sample(range(num_pictures), num_held_out))


def _parts(subsets: Sequence[Subset], known: Scan | None, on_progress: Callable[[int, int], None] | None) -> list[Scan]:
    """Each subset's folder scanned, none twice."""
    scans = {part.folder: part for part in known.parts or [known]} if known else {}
    num_done = 0
    parts = []
    for index, subset in enumerate(subsets):
        folder = Path(os.path.abspath(Path(subset.images).expanduser()))
        if folder not in scans:
            def progress(done: int, total: int, before: int = num_done) -> None:
                nonlocal num_done
                num_done = before + done
                if on_progress:
                    on_progress(num_done, before + total)
            try:
                scans[folder] = scan_pictures(folder, progress)
            except RequestError as error:
                whose = "regularization pictures" if subset.regularization else f"subset {index}"
                raise RequestError(f"{whose}: {error}" if index else str(error)) from None
        parts.append(scans[folder])
    return parts


def _owners(parts: Sequence[Scan]) -> tuple[dict[str, int], int]:
    """Which part each real file counts for, the innermost folder's or else the first; and how many lie in several."""
    depths = [len(Path(os.path.realpath(part.folder)).parts) for part in parts]
    places: dict[str, list[int]] = {}
    for index, part in enumerate(parts):
        for picture in part.pictures:
            places.setdefault(os.path.realpath(picture.path), []).append(index)
    owners = {file: max(indices, key=lambda index: (depths[index], -index)) for file, indices in places.items()}
    return owners, sum(len(indices) > 1 for indices in places.values())


def _walk(folder: Path, repeats: int, problems: list[Problem], seen: set[str]) -> Iterator[Found]:
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
    masks = {name[: -len(MASK_ENDING)]: name for name in names if name.lower().endswith(MASK_ENDING)}
    unused_masks = dict(masks)
    for name in names:
        path = folder / name
        if name.startswith("."):
            continue
        if path.is_dir():
            below = _repeats_below(path, repeats, problems)
            if below:
                yield from _walk(path, below, problems, seen)
        elif path.suffix.lower() in PICTURE_SUFFIXES and not name.lower().endswith(MASK_ENDING):
            unused_masks.pop(path.stem, None)
            if not path.is_file():
                problems.append(Problem(path, "It is a link that leads nowhere, or no regular file. Remove it.", True))
                continue
            real_path = os.path.realpath(path)
            if real_path not in seen:
                seen.add(real_path)
                beside = (captions.get((path.stem, suffix)) for suffix in CAPTION_SUFFIXES)
                caption_name = next(filter(None, beside), None)
                mask_name = masks.get(path.stem)
                yield Found(path, repeats, folder / caption_name if caption_name else None,
                            folder / mask_name if mask_name else None)
    problems += [Problem(folder / name, f"It is a mask, but there is no picture {stem} beside it.", False)
                 for stem, name in unused_masks.items() if not name.startswith(".")]


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
