"""Draws prompts with the demo's base as crumb itself samples, into one labelled picture: docs/demo-base.png."""

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from crumb.engine.data.caches import cache_prompts
from crumb.engine.memory.placement import choose_placement
from crumb.engine.model.load import load_text_encoders, load_unet
from crumb.engine.model.text import encode_prompts
from crumb.engine.run.demo import write_demo_base
from crumb.engine.train.sample import decode, denoise, load_decoder
from crumb.profiles.base_model import fingerprint, inspect_base_model
from crumb.profiles.paths import cache_dir
from crumb.profiles.plan import Plan
from crumb.profiles.sample_prompts import sample_prompts

PROMPTS = (
    "red apple", "cat face", "sun", "automobile", "pizza", "rose", "fish", "house",
    "red heart", "grinning face", "crown", "banana", "soccer ball", "christmas tree", "rocket", "penguin",
)  # fmt: skip
COLUMNS = 8
CREATED = "2026-01-01T00:00:00+00:00"
LABEL = 18


@torch.no_grad()
def draw(base_file: Path, prompts: tuple[str, ...], steps: int = 25, guidance: float = 3.0) -> list[Image.Image]:
    """One picture a prompt, seeds 0, 1, ...; fp32 on the CPU."""
    base = inspect_base_model(base_file)
    plan = Plan(name="sheet", created=CREATED, base_model=str(base_file), images="", resolution=base.native_resolution,
                seed=0, sample_prompts=list(prompts), sample_steps=steps, sample_guidance=guidance, device="cpu",
                mixed_precision="no")
    placement = choose_placement(plan)
    paths = cache_prompts(["", *prompts], lambda device: load_text_encoders(base, torch.float32, device), encode_prompts,
                          fingerprint(base_file), str(torch.float32), cache_dir() / "prompts", on_progress=lambda *_: None,
                          device="cpu")
    unet, vae = load_unet(base, torch.float32), load_decoder(plan, base, placement)
    return [decode(vae, denoise(unet, paths, prompt, plan, placement)) for prompt in sample_prompts(plan)]


def sheet(pictures: list[Image.Image], labels: tuple[str, ...]) -> Image.Image:
    side = pictures[0].width
    rows = -(-len(pictures) // COLUMNS)
    result = Image.new("RGB", (COLUMNS * side, rows * (side + LABEL)), "white")
    draw_on = ImageDraw.Draw(result)
    for index, (picture, label) in enumerate(zip(pictures, labels)):
        left, top = index % COLUMNS * side, index // COLUMNS * (side + LABEL)
        draw_on.text((left + 4, top + 2), label, fill="black")
        result.paste(picture, (left, top + LABEL))
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, help="an SDXL file (default: the packaged one)")
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[2] / "docs/demo-base.png")
    options = parser.parse_args()
    options.out.parent.mkdir(exist_ok=True)
    base_file = options.base or write_demo_base(cache_dir() / "demo")
    sheet(draw(base_file, PROMPTS, guidance=options.guidance), PROMPTS).save(options.out)
