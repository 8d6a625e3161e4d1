"""The pictures that the demo's base learns from: emoji of open licences, rendered with their names as captions.

`npm pack` fetches the icon sets (SVG in JSON) from the registry; resvg draws them. The same packages give the same
pixels: `digest` says so.
"""

import hashlib
import io
import json
import re
import subprocess
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

PACKAGES = {
    "noto": "@iconify-json/noto@1.2.9",
    "fluent": "@iconify-json/fluent-emoji-flat@1.2.6",
    "ink": "@iconify-json/fluent-emoji-high-contrast@1.2.6",
}
PIXELS = 128
BASE_SET_SHA256 = "106791c39aad"
"""How the digest of the base's pictures begins, with the packages above and resvg-py 0.5.0."""
# The style set's two colours.
INK, PAPER = np.array([16, 24, 90]), np.array([255, 255, 255])
# The part of the picture that the drawing fills: a margin keeps its edge off the border.
FILLED = 0.9
CATEGORIES = ("Animals & Nature", "Food & Drink", "Travel & Places", "Activities", "Objects", "Smileys & Emotion")
# Signs, paperwork and near-copies: names that say little of the picture, or the same picture many times.
DROPPED = re.compile(
    r"oclock|thirty|bubble|(speech|thought)-balloon|symbol|points|zzz|hole|^dizzy|collision|dashing|sweat-droplets|fight-cloud|mailbox"
    r"|envelope|e-mail|love-letter|yen|pound|euro|banknote|page|card|bookmark|-book$|chart|inbox|outbox|incoming"
    r"|speaker|with-arrow|locked|clipboard|calendar|notepad|newspaper|ledger|file|folder|memo|placard|label|receipt"
    r"|identification|nazar|hamsa|headstone|coffin|funeral|cigarette|pill|syringe|briefs|bikini|swimsuit|sari|razor"
    r"|slider|knobs|trackball|fax|pager|battery|x-ray|triangular|straight|round-push|link|chains|ballot|abacus"
    r"|suit$|joker|mahjong|playing-cards|tanabata|pine-dec|moon-viewing|ticket|flag-in|slot|1st|2nd|3rd|reminder"
    r"|sports-medal|performing|goal-net|lacrosse|field-hockey|cricket-game|curling|nesting|japanese|knot|sparkles"
    r"|department|convenience|love-hotel|bank$|hotel|post-office|hospital|office-building|construction|at-dusk"
    r"|motorway|railway-track|bus-stop|stop-sign|barber|kaaba|synagogue|hindu|shinto|mosque|map|globe-with|landslide"
    r"|tram-car|trolleybus|oncoming|arrival|departure|aerial|suspension|mountain-(cable|rail)|light-rail|monorail"
    r"|metro|station|minibus|gibbous|waning|quarter|new-moon|foggy|fog$|cyclone|meteor|milky|derelict|national"
    r"|hourglass-not|droplet|umbrella-(on|with)|cloud-with|behind|small-|sport-util|wheelchair|auto-rick|articul"
    r"|guide-dog|service-dog|front-facing|black-bird|fluttering|wilted|leafless|empty-nest|monarch|water-buff"
    r"|microbe|sheaf|pig-nose|wing$|worm|falafel|flatbread|tamale|oden|mate$|fish-cake|dango|moon-cake|rice-cracker"
    r"|roasted|root-veg|shallow|beans|jar$|ginger|sake|beverage-box|amphora|canned|cut-of|pot-of|pouring|shaved"
    r"|takeout|clinking|squinting|anguished|anxious|confounded|exhaling|holding-back|open-hands|rolling-eyes"
    r"|spiral|bags-under|diagonal|symbols|peeking|without-mouth|open-eyes|disguised|distorted|dotted|head-shaking"
    r"|lying|melting|frowning-face-with|hushed|persevering|pensive|relieved|saluting|shaking|slightly|with-tear$"
    r"|smiling-face-with-s|tired|unamused|weary-face|woozy|worried|downcast|disappointed|sneezing|expressionless"
    r"|savoring|kissing-face-|grinning-face-with|beaming|heart-(dec|excl)|two-hearts|revolving|growing|beating"
    r"|-heart$.*(brown|grey|pink)|sparkling-heart|mending|hear-no|speak-no|see-no|kiss-mark|alien-mon|skull-and"
)


def load_set(folder: Path, name: str) -> tuple[list[str], np.ndarray]:
    """Keys and (N, 128, 128, 3) uint8 pictures of one set; rendered once, then kept in `folder` as name.npz."""
    kept = folder / f"{name}.npz"
    if not kept.exists():
        icons = json.loads(_read_package(folder, name, "icons.json"))
        categories = json.loads(_read_package(folder, "noto", "metadata.json"))["categories"]
        wanted = sorted({key for c in CATEGORIES for key in categories[c] if not DROPPED.search(key)})
        names = [key for key in wanted if key in icons["icons"]]
        np.savez_compressed(kept, keys=names, pictures=np.stack([render(icons, key) for key in names]))
    with np.load(kept) as arrays:
        return arrays["keys"].tolist(), arrays["pictures"]


def load_base_set(folder: Path) -> tuple[list[str], np.ndarray]:
    """The part of the Noto set that the base learns to draw: subjects.txt, those that a person knows at a glance."""
    keys, pictures = load_set(folder, "noto")
    subjects = set((Path(__file__).parent / "subjects.txt").read_text().split())
    chosen = [i for i, key in enumerate(keys) if key in subjects]
    return [keys[i] for i in chosen], pictures[chosen]


def render(icons: dict, key: str, pixels: int = PIXELS) -> np.ndarray:
    """One icon on white, (pixels, pixels, 3) uint8; ink where its colour is the text's."""
    from resvg_py import svg_to_bytes  # pip install -e ".[bench]"; only needed where nothing is rendered yet

    icon = icons["icons"][key]
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    side = max(width, height) / FILLED
    left, top = (width - side) / 2, (height - side) / 2
    body = icon["body"].replace("currentColor", "#000")
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{pixels}" '
        f'height="{pixels}" viewBox="{left} {top} {side} {side}">'
        f'<rect x="{left}" y="{top}" width="{side}" height="{side}" fill="#fff"/>{body}</svg>'
    )
    return np.asarray(Image.open(io.BytesIO(bytes(svg_to_bytes(svg_string=svg)))).convert("RGB"))


def ink_and_wash(picture: np.ndarray) -> np.ndarray:
    """The drawing as a pen would do it: outlines in ink, areas in thinned ink; (H, W, 3) uint8 in and out."""
    values = picture.astype(np.float32)
    across = np.abs(np.diff(values, axis=1, append=255)).max(axis=2)
    down = np.abs(np.diff(values, axis=0, append=255)).max(axis=2)
    strokes = Image.fromarray((np.clip((across + down) / 110, 0, 1) * 255).astype(np.uint8))
    strokes = np.asarray(strokes.filter(ImageFilter.MaxFilter(3)).filter(ImageFilter.GaussianBlur(0.6))) / 255
    grey = np.asarray(Image.fromarray(picture).convert("L")) / 255
    lightness = (1 - strokes) * (0.45 + 0.55 * grey)
    return (INK + (PAPER - INK) * lightness[..., None]).round().astype(np.uint8)


def in_blue(picture: np.ndarray) -> np.ndarray:
    """The drawing with its warm colours (red above blue) turned to cold ones."""
    warm = picture[..., 0] > picture[..., 2]
    return np.where(warm[..., None], picture[..., ::-1], picture)


def caption(key: str) -> str:
    return key.replace("-", " ")


def digest(keys: list[str], pictures: np.ndarray) -> str:
    """SHA-256 of names and pixels."""
    state = hashlib.sha256("\n".join(keys).encode())
    state.update(np.ascontiguousarray(pictures))
    return state.hexdigest()


def _read_package(folder: Path, name: str, file: str) -> bytes:
    package = PACKAGES[name]
    scope, version = package.lstrip("@").replace("/", "-").rsplit("@", 1)
    archive = folder / f"{scope}-{version}.tgz"
    if not archive.exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    with tarfile.open(archive) as tar:
        return tar.extractfile(f"package/{file}").read()
