"""The packaged demo set: whole, captioned, small, and every picture's licence is written down."""

from importlib.resources import files
from pathlib import Path

from crumb.profiles.dataset import scan_pictures


def test_demo_pictures():
    folder = Path(str(files("crumb.engine") / "demo" / "pictures"))
    scan = scan_pictures(folder)
    assert len(scan.pictures) == 6 and not scan.problems
    assert all(picture.caption and max(picture.width, picture.height) <= 512 for picture in scan.pictures)
    sources = (folder / "SOURCES.md").read_text(encoding="utf-8")
    assert all(f"`{picture.path.name}`" in sources for picture in scan.pictures)
    assert sum(file.stat().st_size for file in folder.iterdir()) < 500_000
