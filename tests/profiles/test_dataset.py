"""The scan of a picture folder: what is found, what is refused, and what each message says."""

import os
import struct
import subprocess
import sys
import warnings
import zlib

import pytest
from PIL import Image, features

from crumb.profiles.dataset import caption_for, mask_findings, scan_pictures, scan_subsets
from crumb.profiles.errors import RequestError
from crumb.profiles.pictures import Picture, mask_of
from crumb.profiles.subsets import Subset


def save(path, size=(96, 80), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise(size, 90).convert(mode).save(path, **options)
    return path


def problems_by_name(scan):
    return {problem.path.name: problem for problem in scan.problems}


def test_finds_every_format_in_natural_order(tmp_path):
    names = ["2.JPG", "10.png", "a.WebP", "b.bmp", "c.tif", "d.TIFF", "e.gif", "f.jpeg"]
    names += ["照片 1.png", "zwei Wörter.PNG"]
    names += ["g.avif"] if features.check("avif") else []
    for name in names:
        save(tmp_path / name)
    save(tmp_path / ".hidden.png")
    save(tmp_path / ".cache" / "thumb.png")
    (tmp_path / "notes.md").write_text("no picture")
    seen = []
    scan = scan_pictures(tmp_path, on_progress=lambda done, total: seen.append((done, total)))
    found = [picture.path.name for picture in scan.pictures]
    assert set(found) == set(names)
    assert found[:2] == ["2.JPG", "10.png"]
    assert not scan.problems
    assert seen == [(done, len(names)) for done in range(1, len(names) + 1)]


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_size_is_as_shown_after_rotation(tmp_path, suffix):
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / f"phone{suffix}", size=(200, 100), exif=exif)
    (picture,) = scan_pictures(tmp_path).pictures
    assert (picture.width, picture.height) == (100, 200)


def test_repeat_folders_and_links(tmp_path):
    save(tmp_path / "a.png")
    save(tmp_path / "10_sks girl" / "b.png")
    save(tmp_path / "10_sks girl" / "close up" / "c.png")
    save(tmp_path / "10_sks girl" / "3_face" / "d.png")
    save(tmp_path / "0_unused" / "e.png")
    save(tmp_path / "2024_summer" / "f.png")
    save(tmp_path.parent / "beside" / "stranger.png")
    (tmp_path / "10_sks girl" / "loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "up").symlink_to(tmp_path.parent, target_is_directory=True)
    (tmp_path / "z again.png").symlink_to(tmp_path / "a.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    scan = scan_pictures(tmp_path)
    repeats = {picture.path.name: picture.repeats for picture in scan.pictures}
    assert repeats == {"a.png": 1, "b.png": 10, "c.png": 10, "d.png": 3, "f.png": 1}
    assert {name: problem.fatal for name, problem in problems_by_name(scan).items()} == {
        "0_unused": False,
        "2024_summer": False,
        "gone.png": True,
    }


def test_captions(tmp_path):
    captions = {
        "plain.txt": b"a cat",
        "bom.txt": "\ufeff  a d\u00f6g \r\n on grass\n\n".encode(),
        "other.caption": b"from .caption",
        "both.txt": b"text wins",
        "both.caption": b"loses",
        "latin.txt": b"caf\xe9",
        "utf16.txt": "a cat".encode("utf-16"),
        "blank.txt": b" \n ",
    }
    for name, content in captions.items():
        (tmp_path / name).write_bytes(content)
    for name in ("plain", "bom", "other", "both", "latin", "utf16", "blank", "none"):
        save(tmp_path / f"{name}.png")
    scan = scan_pictures(tmp_path)
    assert {picture.path.stem: picture.caption for picture in scan.pictures} == {
        "plain": "a cat",
        "bom": "a d\u00f6g on grass",
        "other": "from .caption",
        "both": "text wins",
        "latin": None,
        "utf16": None,
        "blank": None,
        "none": None,
    }
    problems = problems_by_name(scan)
    assert set(problems) == {"latin.txt", "utf16.txt", "blank.txt"}
    assert not any(problem.fatal for problem in scan.problems)
    assert "Save it again as UTF-8" in problems["latin.txt"].text


def png_header(width, height):
    """A PNG that claims a size and holds no such pixels."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = b""
    for kind, data in ((b"IHDR", head), (b"IDAT", zlib.compress(b"\0"))):
        chunks += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return b"\x89PNG\r\n\x1a\n" + chunks


def test_unusable_files_are_named_and_nothing_leaks(tmp_path):
    save(tmp_path / "good.png")
    for suffix in ("jpg", "png", "webp", "bmp", "tif", "gif"):
        whole = save(tmp_path / f"cut.{suffix}", size=(300, 300)).read_bytes()
        (tmp_path / f"cut.{suffix}").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "bomb.png").write_bytes(png_header(60_000, 60_000))
    (tmp_path / "big claim.png").write_bytes(png_header(14_000, 14_000))
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "page.jpg").write_text("<html>404</html>")
    os.mkfifo(tmp_path / "pipe.png")
    save(tmp_path / "tiny.png", size=(63, 500))
    limit = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scan = scan_pictures(tmp_path)
    assert limit == Image.MAX_IMAGE_PIXELS
    assert [picture.path.name for picture in scan.pictures] == ["good.png"]
    problems = problems_by_name(scan)
    assert set(problems) == set(os.listdir(tmp_path)) - {"good.png"}
    assert all(problem.fatal for problem in scan.problems)
    assert "300 megapixels" in problems["bomb.png"].text
    assert "63 x 500" in problems["tiny.png"].text


def test_animations_count_once_with_a_remark(tmp_path):
    frames = [Image.new("RGB", (80, 80), color) for color in ("red", "green", "blue")]
    for name in ("a.gif", "b.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    scan = scan_pictures(tmp_path)
    assert len(scan.pictures) == 2
    assert [(problem.fatal, "first frame" in problem.text) for problem in scan.problems] == [(False, True)] * 2


def test_wrong_folders_are_request_errors(tmp_path):
    file = save(tmp_path / "set" / "a.png")
    empty = tmp_path / "empty"
    empty.mkdir()
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "x.png").write_bytes(b"no")
    cases = [(tmp_path / "nowhere", "no folder"), (file, "is a file"), (empty, "no picture"), (broken, "x.png")]
    for folder, words in cases:
        with pytest.raises(RequestError, match=words):
            scan_pictures(folder)


@pytest.mark.parametrize(
    ("caption", "trigger", "class_word", "expected"),
    [
        ("a cat on a sofa", "ohwx", "cat", "ohwx, a cat on a sofa"),
        ("photo of OHWX cat", "ohwx", "cat", "photo of OHWX cat"),
        ("photo of ohwxy cat", "ohwx", "cat", "ohwx, photo of ohwxy cat"),
        ("a cat", "", "cat", "a cat"),
        (None, "ohwx", "cat", "ohwx cat"),
        (None, "ohwx", "", "ohwx"),
        ("c++ (code)", "c++", "", "c++ (code)"),
    ],
)
def test_caption_for(tmp_path, caption, trigger, class_word, expected):
    assert caption_for(Picture(tmp_path, 64, 64, 1, caption, None), trigger, class_word) == expected


def masks_by_name(scan):
    return {picture.path.name: {mask.kind: mask.fault for mask in picture.masks} for picture in scan.pictures}


def test_masks_are_found_and_are_no_pictures(tmp_path):
    for name in ("plain.png", "masked.jpg", "black.png", "other shape.png", "broken.png", "both.png", "half size.png"):
        save(tmp_path / name, size=(100, 200))
    Image.merge("LA", [Image.effect_noise((100, 200), 90)] * 2).save(tmp_path / "both.png")
    save(tmp_path / "masked-masklabel.png", size=(100, 200), mode="L")
    save(tmp_path / "both-MASKLABEL.PNG", size=(100, 200), mode="RGB")
    save(tmp_path / "other shape-masklabel.png", size=(200, 100), mode="L")
    save(tmp_path / "half size-masklabel.png", size=(50, 99), mode="1")
    Image.new("I;16", (100, 200)).save(tmp_path / "black-masklabel.png")
    (tmp_path / "broken-masklabel.png").write_bytes(b"no")
    save(tmp_path / "nobody-masklabel.png", size=(100, 200), mode="L")
    scan = scan_pictures(tmp_path)
    masks = masks_by_name(scan)
    assert masks["plain.png"] == {} and masks["masked.jpg"] == {"files": ""} and masks["half size.png"] == {"files": ""}
    assert set(masks["both.png"]) == {"alpha", "files"}
    assert "black all over" in masks["black.png"]["files"] and "can't be used" in masks["broken.png"]["files"]
    assert "200 x 100" in masks["other shape.png"]["files"]
    assert len(masks) == 7 and {name: problem.fatal for name, problem in problems_by_name(scan).items()} == {
        "nobody-masklabel.png": False}, "faults of masks are no problems until masks are asked for"


def test_alpha_is_a_mask_only_where_something_is_transparent(tmp_path):
    alpha = Image.new("L", (100, 100), 255)
    alpha.paste(0, (0, 0, 50, 100))
    for name, channel in {"half": alpha, "solid": Image.new("L", (100, 100), 255), "clear": Image.new("L", (100, 100))}.items():
        image = Image.new("RGB", (100, 100), "red")
        image.putalpha(channel)
        image.save(tmp_path / f"{name}.png")
    indexed = Image.new("P", (100, 100))
    indexed.paste(1, (0, 0, 50, 100))
    indexed.putpalette([200, 0, 0, 0, 150, 0])
    indexed.save(tmp_path / "one clear color.png", transparency=1)
    save(tmp_path / "photo.jpg")
    masks = masks_by_name(scan_pictures(tmp_path))
    assert masks["half.png"] == masks["one clear color.png"] == {"alpha": ""}
    assert masks["solid.png"] == masks["photo.jpg"] == {} and "transparent all over" in masks["clear.png"]["alpha"]


def subset(images, **settings):
    plain = {"repeats": 1, "trigger": "", "class_word": "", "flip": False, "masked_loss": "off"}
    return Subset(images=str(images), **plain | settings)


def test_a_mask_that_cannot_be_used_refuses_its_picture_when_masks_are_wanted(tmp_path):
    for name in ("good.png", "bad.png", "bare.png"):
        save(tmp_path / name)
    save(tmp_path / "good-masklabel.png", mode="L")
    Image.new("L", (96, 80)).save(tmp_path / "bad-masklabel.png")
    scan = scan_subsets([subset(tmp_path)])
    assert len(scan.pictures) == 3 and not scan.problems and not mask_findings(scan.pictures, [subset(tmp_path)])
    masked = [subset(tmp_path, masked_loss="files")]
    scan = scan_subsets(masked, scan)
    assert [picture.path.name for picture in scan.pictures] == ["bare.png", "good.png"]
    (problem,) = scan.problems
    assert problem.fatal and problem.path.name == "bad-masklabel.png" and "black all over" in problem.text
    (finding,) = mask_findings(scan.pictures, masked)
    assert "1 of 2" in finding and "bare.png" in finding and "trained whole" in finding
    assert mask_of(scan.pictures[1], "files").path.name == "good-masklabel.png"
    assert len(mask_findings(scan.pictures, [subset(tmp_path, masked_loss="alpha")])) == 1


def test_several_folders_are_one_set_and_shared_files_count_once(tmp_path):
    own, reg, inner = tmp_path / "own", tmp_path / "reg", tmp_path / "own" / "2_faces"
    for path in (own / "b.png", own / "a.png", inner / "c.png", reg / "d.png", reg / "e.png"):
        save(path)
    (reg / "same as a.png").symlink_to(own / "a.png")
    (own / "cut.png").write_bytes(b"no")
    (inner / "cut.png").write_bytes(b"no")
    subsets = [subset(own), subset(inner, repeats=5), subset(reg, regularization=True)]
    seen = []
    scan = scan_subsets(subsets, on_progress=lambda done, total: seen.append((done, total)))
    told = [(picture.path.name, picture.subset, picture.repeats) for picture in scan.pictures]
    assert told == [("a.png", 0, 1), ("b.png", 0, 1), ("c.png", 1, 1), ("d.png", 2, 1), ("e.png", 2, 1)]
    assert scan.folder == own and [part.folder for part in scan.parts] == [own, inner, reg]
    assert seen == sorted(seen)
    texts = [(problem.path.name, problem.fatal) for problem in scan.problems]
    assert sorted(texts) == [("cut.png", True), ("cut.png", True), ("own", False)], "broken files and the overlap are told once"
    assert "2 of its pictures" in next(problem.text for problem in scan.problems if not problem.fatal)


def test_known_folders_are_not_read_again_and_others_are(tmp_path):
    own, more = tmp_path / "own", tmp_path / "more"
    save(own / "a.png")
    save(more / "b.png")
    known = scan_pictures(own)
    (own / "a.png").unlink()
    both = scan_subsets([subset(own), subset(more)], known)
    assert [picture.path.name for picture in both.pictures] == ["a.png", "b.png"]
    (more / "b.png").unlink()
    assert len(scan_subsets([subset(own), subset(more)], both).pictures) == 2
    with pytest.raises(RequestError, match="no picture"):
        scan_subsets([subset(own), subset(more)], known)


def test_folders_that_add_nothing_are_refused(tmp_path):
    save(tmp_path / "own" / "a.png")
    (tmp_path / "empty").mkdir()
    for further, words in [(tmp_path / "own", "another of the folders"), (tmp_path / "empty", "no picture"),
                           (tmp_path / "nowhere", "no folder")]:
        with pytest.raises(RequestError, match=words):
            scan_subsets([subset(tmp_path / "own"), subset(further, regularization=True)])
    # A folder whose pictures all lie in folders within it: they are those of the inner ones.
    save(tmp_path / "outer" / "in" / "b.png")
    scan = scan_subsets([subset(tmp_path / "outer"), subset(tmp_path / "outer" / "in")])
    assert [picture.subset for picture in scan.pictures] == [1]
    with pytest.raises(RequestError, match="black all over"):
        Image.new("L", (96, 80)).save(tmp_path / "own" / "a-masklabel.png")
        scan_subsets([subset(tmp_path / "own", masked_loss="files")])


def test_importing_needs_neither_torch_nor_pillow():
    code = "import sys, crumb.profiles.dataset, crumb.profiles.buckets; print({'torch', 'PIL'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-P", "-c", code], text=True).strip() == "set()"
