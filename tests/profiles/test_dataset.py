"""The scan of a picture folder: what is found, what is refused, and what each message says."""

import os
import struct
import subprocess
import sys
import warnings
import zlib

import pytest
from PIL import Image, features

from crumb.profiles.dataset import Picture, caption_for, scan_pictures
from crumb.profiles.errors import RequestError


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


def test_importing_needs_neither_torch_nor_pillow():
    code = "import sys, crumb.profiles.dataset, crumb.profiles.buckets; print({'torch', 'PIL'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-P", "-c", code], text=True).strip() == "set()"
