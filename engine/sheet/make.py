"""Checkpoints x strengths on fixed prompts and seeds: one picture to choose the file to keep by.

Text encoders, U-Net and VAE are in memory one after the other; the U-Net is loaded once, and only the LoRA in it changes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from crumb.engine.data.prepare import cache_texts, load_entry
from crumb.engine.memory.placement import Placement, choose_placement, free_memory, settle_torch
from crumb.engine.model.load import load_text_encoders, load_unet
from crumb.engine.network.load import put_lora, set_strength
from crumb.engine.network.lora import Network, attach_lora
from crumb.engine.network.text import attach_text_lora
from crumb.engine.run.directory import RunDirectory
from crumb.engine.run.lora_files import LoraFile, lora_files
from crumb.engine.sheet.draw import Block, Row, draw_sheet, sheet_scale, shrunk
from crumb.engine.train.sample import decode_all, denoise, load_decoder
from crumb.engine.train.text import encode_texts
from crumb.profiles.base_model import BaseModel, fingerprint, inspect_base_model
from crumb.profiles.errors import RequestError
from crumb.profiles.plan import Plan, load_plan
from crumb.profiles.sample_prompts import SamplePrompt, parse_sample_prompts, texts_of, with_steps

Report = Callable[[str, int, int], None]
"""Told the phase, how much of it is done, and of how much."""

Entries = dict[str, dict[str, Tensor]]
"""Conditioning by text."""

Cell = tuple[LoraFile | None, float]
"""A file at a strength; (None, 0.0) is the base model."""
BASE: Cell = (None, 0.0)


@dataclass(frozen=True)
class Sheet:
    """What is asked for. `lines` are sample prompts with their options; `steps` replaces the steps of all of them."""

    run: RunDirectory
    lines: list[str]
    strengths: list[float]
    steps: int | None = None


def make_sheet(sheet: Sheet, report: Report) -> Image.Image:
    """The labelled picture; RequestError where the run has no LoRA file."""
    plan = load_plan(sheet.run.plan)
    files = lora_files(sheet.run, plan.steps)
    if not files:
        raise RequestError(f"The run {sheet.run.name!r} has no LoRA file yet.")
    # Prompts and titles from the same lines: a title says what its pictures were drawn with.
    lines = [with_steps(line, sheet.steps) if sheet.steps else line for line in sheet.lines]
    prompts = parse_sample_prompts(lines, plan)
    base = inspect_base_model(Path(plan.base_model))
    placement = choose_placement(plan)
    settle_torch(base, placement)
    scale = sheet_scale([(prompt.width, prompt.height) for prompt in prompts], len(files) * (1 + len(sheet.strengths)))
    cells = list(dict.fromkeys(cell for file in files for cell in _cells_of(file, sheet)))
    pictures = draw_cells(plan, base, placement, prompts, cells, scale, report)
    report("draw", 0, 1)
    blocks = [
        Block(line, [Row(file.describe(), [pictures[cell][index] for cell in _cells_of(file, sheet)], file.is_best)
                     for file in files])
        for index, line in enumerate(lines)
    ]
    heading = f"{sheet.run.name} on {base.path.name}: LoRA files by strength"
    return draw_sheet(heading, ["base", *map(str, sheet.strengths)], blocks)


def draw_cells(plan: Plan, base: BaseModel, placement: Placement, prompts: list[SamplePrompt], cells: list[Cell],
               scale: float, report: Report) -> dict[Cell, list[Image.Image]]:
    """Each cell's pictures, one a prompt; cells of one file should follow each other, since it is read anew otherwise."""
    entries_of_cells = _cached_texts if not plan.text_encoders_learn else _texts_by_cell
    entries = entries_of_cells(plan, base, placement, texts_of(prompts), cells, report)
    report("load", 0, 1)
    with torch.no_grad():
        latents = _denoise_cells(plan, base, placement, prompts, cells, entries, report)
        free_memory()
        vae = load_decoder(plan, base, placement)
        pictures = {}
        for index, (cell, of_cell) in enumerate(latents.items()):
            report("decode", index, len(latents))
            pictures[cell] = [shrunk(image, scale) for image in decode_all(vae, [one.to(vae.device) for one in of_cell])]
    return pictures


def _cached_texts(plan: Plan, base: BaseModel, placement: Placement, texts: list[str], cells: list[Cell],
                  report: Report) -> dict[Cell, Entries]:
    """The base's own conditioning for every cell, from the cache that training shares."""
    base_sha256 = fingerprint(base.path, lambda done, total: report("hash", done, total))
    paths = cache_texts(texts, plan, base, base_sha256, placement, lambda done, total: report("encode", done, total))
    entries = {text: load_entry(path) for text, path in paths.items()}
    return {cell: entries for cell in cells}


def _texts_by_cell(plan: Plan, base: BaseModel, placement: Placement, texts: list[str], cells: list[Cell],
                   report: Report) -> dict[Cell, Entries]:
    """Conditioning by the text encoders with each cell's own LoRA; the encoders are gone from memory afterwards."""
    encoders, network, entries = load_text_encoders(base, placement.dtype, placement.device), Network(), {}
    attach_text_lora(network, encoders, plan)
    for number, cell in enumerate(_each_in_place(cells, network, "lora_te")):
        report("encode", number, len(cells))
        entries[cell] = encode_texts(texts, encoders, plan)
    del encoders, network
    free_memory()
    return entries


def _denoise_cells(plan: Plan, base: BaseModel, placement: Placement, prompts: list[SamplePrompt], cells: list[Cell],
                   entries: dict[Cell, Entries], report: Report) -> dict[Cell, list[Tensor]]:
    """Latents on the CPU, where a thousand of them are small; the U-Net is gone from memory afterwards."""
    unet, network = _load_network(plan, base, placement, report)
    total, done = sum(prompt.steps for prompt in prompts) * len(cells), 0

    def on_step() -> None:
        nonlocal done
        done += 1
        report("denoise", done, total)

    report("denoise", 0, total)
    return {cell: [denoise(unet, entries[cell], prompt, plan, placement, on_step).cpu() for prompt in prompts]
            for cell in _each_in_place(cells, network, "lora_unet")}


def _each_in_place(cells: list[Cell], network: Network, part: str) -> Iterator[Cell]:
    """Each cell in turn, its file in the network's layers at its strength; neighbours share one reading of a file."""
    present = None
    for file, strength in cells:
        if file is not None and file is not present:
            put_lora(network, file.path, part)
            present = file
        set_strength(network, strength)
        yield file, strength


def _load_network(plan: Plan, base: BaseModel, placement: Placement, report: Report) -> tuple[nn.Module, Network]:
    """The U-Net as training has it, with layers for the run's LoRA files."""
    unet = load_unet(base, placement.dtype, placement.device, placement.fit.quantize_base, base_sha256=fingerprint(base.path),
                     on_progress=lambda done, total: report("load", done, total))
    return unet, attach_lora(unet, plan)


def _cells_of(file: LoraFile, sheet: Sheet) -> list[Cell]:
    """One row, from left to right."""
    return [BASE, *((file, strength) for strength in sheet.strengths)]
