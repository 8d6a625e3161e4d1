"""What settings teach the demo's base its ink-and-wash style, measured on subjects that the style set does not hold.

    python -P benchmarks/learning.py --work demo-base --arms rank=4 rank=64 optimizer=Lion,learning_rate=3e-5

Each arm is a real run of the engine with the derived plan and the named overrides. After it: the held-out loss (fixed
noise, fixed timesteps) and the style score, the share of pictures drawn for held-out prompts that a small classifier
takes for ink and wash. The classifier sees pictures in grey and in any two tones as often as in their own colours, so
that it must go by strokes; its accuracy on each kind goes with the results. They go to WORK/learning.jsonl, a line an arm.

Needs `pip install -e ".[bench]"`, and npm to fetch the emoji the first time.
"""

import argparse
import json
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from zlib import crc32

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent / "demo_base"))

from pictures import INK, PIXELS, caption, ink_and_wash, load_base_set

from crumb.engine.model import keys
from crumb.engine.model.load import load_text_encoders, load_unet, load_vae
from crumb.engine.model.text import encode_prompts
from crumb.engine.run.demo import demo_folder, write_demo_base
from crumb.engine.run.directory import RunDirectory, create_run, read_state
from crumb.engine.run.launch import launch_engine
from crumb.engine.train.noise import add_noise, alphas_cumprod
from crumb.engine.train.sample import make_scheduler
from crumb.profiles.answers import Answers
from crumb.profiles.base_model import inspect_base_model
from crumb.profiles.dataset import scan_pictures
from crumb.profiles.errors import RequestError
from crumb.profiles.interview import Interview, conclude
from crumb.profiles.plan import Plan
from crumb.wizard.commands import unused_name
from crumb.wizard.planning import parse_setting

REPORTED = ("optimizer", "optimizer_args", "learning_rate", "scheduler", "targets", "rank", "alpha", "conv_rank", "conv_alpha",
            "steps", "batch_size", "seed")
TRIGGER = "crumbdemo"
NUM_HELD_OUT = 64
TIMESTEPS = tuple(range(50, 1000, 100))
SAMPLE_STEPS, GUIDANCE = 20, 3.0
CLASSIFIER_STEPS, CLASSIFIER_BATCH, CLASSIFIER_RATE = 1500, 64, 4e-3


class Judge:
    """Everything that is fixed between arms: the base, the held-out pictures, their noise, the classifier."""

    def __init__(self, base_file: Path, work: Path):
        self.base = inspect_base_model(base_file)
        self.vae = load_vae(self.base, None, torch.float32)
        taught = {path.stem for path in demo_folder("style").glob("*.png")}
        names, pictures = load_base_set(work)
        colour = dict(zip(names, pictures))
        ink = {name: ink_and_wash(picture) for name, picture in colour.items()}
        untaught = [name for name in names if name not in taught]
        chosen = torch.randperm(len(untaught), generator=torch.Generator().manual_seed(0))[:NUM_HELD_OUT].tolist()
        self.names = [untaught[i] for i in sorted(chosen)]
        self.latents = self._encode(_pixels(ink, self.names)) * self.vae.config.scaling_factor
        self.noise = torch.randn(len(TIMESTEPS), *self.latents.shape, generator=torch.Generator().manual_seed(1))
        prompts = [f"{TRIGGER}, {caption(name)}" for name in self.names]
        with torch.no_grad():
            encoders = load_text_encoders(self.base, torch.float32)
            self.hidden, self.pooled = encode_prompts(encoders, prompts)
            self.empty_hidden, self.empty_pooled = encode_prompts(encoders, [""])
        rest = [name for name in names if name not in self.names]
        self.classifier = self._train_classifier(_pixels(colour, rest), _pixels(ink, rest))
        self.accuracy = self._accuracy(_pixels(colour, self.names), _pixels(ink, self.names))

    @torch.no_grad()
    def held_out_loss(self, unet) -> float:
        """Mean squared error of the predicted noise, the same noise and timesteps every time."""
        losses = []
        for timestep, noise in zip(TIMESTEPS, self.noise):
            timesteps = torch.full((len(self.latents),), timestep)
            noisy = add_noise(self.latents, noise, timesteps, alphas_cumprod(False))
            losses.append(F.mse_loss(self._predict(unet, noisy, timesteps, self.hidden, self.pooled), noise).item())
        return sum(losses) / len(losses)

    @torch.no_grad()
    def draw(self, unet) -> Tensor:
        """One picture a held-out prompt, (N, 3, 128, 128) in [-1, 1], from seeds 0, 1, ..."""
        created = "2026-01-01T00:00:00+00:00"
        scheduler = make_scheduler(Plan(name="", created=created, base_model="", images="", prediction_type="epsilon"))
        scheduler.set_timesteps(SAMPLE_STEPS)
        latents = torch.cat([torch.randn((1, *self.latents.shape[1:]), generator=torch.Generator().manual_seed(seed))
                             for seed in range(len(self.names))]) * scheduler.init_noise_sigma  # fmt: skip
        for timestep in scheduler.timesteps:
            scaled = scheduler.scale_model_input(latents, timestep)
            empty = self._predict(unet, scaled, timestep, self.empty_hidden.expand_as(self.hidden),
                                  self.empty_pooled.expand_as(self.pooled))  # fmt: skip
            guided = empty + GUIDANCE * (self._predict(unet, scaled, timestep, self.hidden, self.pooled) - empty)
            latents = scheduler.step(guided, timestep, latents).prev_sample
        parts = (latents / self.vae.config.scaling_factor).split(16)
        return torch.cat([self.vae.decode(part).sample for part in parts]).clamp(-1, 1)

    @torch.no_grad()
    def style_score(self, pictures: Tensor) -> float:
        return (self.classifier(pictures) > 0).float().mean().item()

    def _predict(self, unet, noisy: Tensor, timesteps: Tensor, hidden: Tensor, pooled: Tensor) -> Tensor:
        side = float(self.base.native_resolution)
        time_ids = torch.tensor([[side, side, 0.0, 0.0, side, side]]).expand(len(noisy), -1)
        added = {"text_embeds": pooled, "time_ids": time_ids}
        return unet(noisy, timesteps, encoder_hidden_states=hidden, added_cond_kwargs=added, return_dict=False)[0]

    @torch.no_grad()
    def _encode(self, pixels: Tensor) -> Tensor:
        return torch.cat([self.vae.encode(part).latent_dist.mean for part in pixels.split(16)])

    @torch.no_grad()
    def _through_vae(self, pixels: Tensor) -> Tensor:
        """As the base can draw them at best, so that the classifier can't go by sharpness."""
        return torch.cat([self.vae.decode(self.vae.encode(part).latent_dist.mean).sample for part in pixels.split(16)])

    def _train_classifier(self, colour: Tensor, ink: Tensor) -> nn.Module:
        torch.manual_seed(0)
        classifier = nn.Sequential(
            nn.AvgPool2d(2), nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(),
            nn.Conv2d(32, 32, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(32, 1), nn.Flatten(0),
        )  # fmt: skip
        pictures = self._through_vae(torch.cat([colour, ink]))
        labels = torch.cat([torch.zeros(len(colour)), torch.ones(len(ink))])
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=CLASSIFIER_RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, CLASSIFIER_STEPS)
        for _ in range(CLASSIFIER_STEPS):
            chosen = torch.randint(len(pictures), (CLASSIFIER_BATCH,))
            shown = torch.cat([retinted(pictures[chosen]), blots(CLASSIFIER_BATCH // 8)])
            answers = torch.cat([labels[chosen], torch.zeros(CLASSIFIER_BATCH // 8)])
            loss = F.binary_cross_entropy_with_logits(classifier(shown), answers)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        return classifier.eval()

    @torch.no_grad()
    def _accuracy(self, colour: Tensor, ink: Tensor) -> dict[str, float]:
        """Share that is called right: as they are, in grey, and colour pictures in the two tones of ink."""
        colour, ink = self._through_vae(colour), self._through_vae(ink)
        in_tones = two_tones(colour, torch.tensor(INK / 127.5 - 1, dtype=torch.float32).expand(len(colour), 3))
        right = {"as they are": [self.classifier(colour) <= 0, self.classifier(ink) > 0],
                 "in grey": [self.classifier(two_tones(colour)) <= 0, self.classifier(two_tones(ink)) > 0],
                 "colour pictures in ink's blue": [self.classifier(in_tones) <= 0],
                 "noise": [self.classifier(blots(len(colour))) <= 0]}
        return {kind: round(torch.cat(answers).float().mean().item(), 3) for kind, answers in right.items()}


def two_tones(pictures: Tensor, dark: Tensor | None = None) -> Tensor:
    """The pictures' light alone, on a ramp from `dark` (N, 3), black where None, to white."""
    light = (pictures * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True) / 2 + 0.5
    dark = torch.full((len(pictures), 3), -1.0) if dark is None else dark
    return dark[:, :, None, None] + light * (1 - dark[:, :, None, None])


def retinted(pictures: Tensor) -> Tensor:
    """A third as they are, a third in grey, a third in two tones of any hue."""
    kind = torch.randint(0, 3, (len(pictures), 1, 1, 1))
    tones = two_tones(pictures, torch.rand(len(pictures), 3) * 1.6 - 1)
    return torch.where(kind == 0, pictures, torch.where(kind == 1, two_tones(pictures), tones))


def blots(count: int) -> Tensor:
    """Coarse noise in two tones: what a run that fell apart draws, which is no ink."""
    side = int(torch.randint(4, 65, ()))
    noise = F.interpolate(torch.randn(count, 3, side, side), PIXELS, mode="bilinear").clamp(-1, 1)
    return retinted(noise)


def merge_lora(unet, path: Path) -> None:
    """Adds a LoRA file into the U-Net's weights, in place."""
    tensors = load_file(path)
    left = {name.removesuffix(".alpha") for name in tensors if name.endswith(".alpha")}
    for name, module in unet.named_modules():
        stem = keys.lora_stem(name) if isinstance(module, (nn.Linear, nn.Conv2d)) else ""
        if stem in left:
            down, up = tensors[f"{stem}.lora_down.weight"].float(), tensors[f"{stem}.lora_up.weight"].float()
            scale = tensors[f"{stem}.alpha"].item() / down.shape[0]
            module.weight.data += scale * (up.flatten(1) @ down.flatten(1)).view_as(module.weight)
            left.discard(stem)
    if left:
        raise ValueError(f"{path} has parts that the U-Net lacks: {sorted(left)[:3]}")


def plan_arm(arm: str, base_file: Path) -> Interview:
    """The arm's plan; RequestError where its settings can't stand."""
    overrides = dict(parse_setting(setting) for setting in re.split(r",(?![^{]*})", arm)) if arm != "derived" else {}
    slug = re.sub(r"[^\w-]+", "-", arm)[:50].strip("-")
    name = unused_name(f"learning-{slug}-{crc32(arm.encode()):08x}")
    pictures = demo_folder("style")
    answers = Answers(images=str(pictures), base=str(base_file), subject="style", trigger=TRIGGER, name=name,
                      overrides={"sample_every": 0, "save_every": 0, "held_out_pictures": 0, **overrides})
    return conclude(answers, scan_pictures(pictures))


def train_arm(interview: Interview) -> tuple[RunDirectory, float]:
    """Runs the engine on the style set; returns the run and the seconds it took."""
    run = create_run(interview.plan.name, interview.toml())
    began = time.monotonic()
    launch_engine(run).wait()
    return run, time.monotonic() - began


def measure(judge: Judge, unet, line: dict, work: Path) -> None:
    """Keeps the arm's line in `work` with held-out loss and style score, and the pictures drawn for it."""
    pictures = judge.draw(unet)
    np.save(work / f"drawn-{line['run']}.npy", ((pictures + 1) * 127.5).byte().numpy())
    scores = {"held_out_loss": round(judge.held_out_loss(unet), 5), "style_score": round(judge.style_score(pictures), 3)}
    report(line | scores, work)


def report(line: dict, work: Path) -> None:
    print(json.dumps(line), flush=True)
    with (work / "learning.jsonl").open("a") as log:
        log.write(json.dumps(line) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("demo-base"), help="folder of the rendered sets and of the runs")
    parser.add_argument("--arms", nargs="+", default=["derived"], help="KEY=VALUE,KEY=VALUE, or derived")
    parser.add_argument("--at-once", type=int, default=2, help="arms that train side by side, a core each")
    parser.add_argument("--base", type=Path, help="another base of the recipe (default: the packaged one)")
    options = parser.parse_args()
    os.environ["CRUMB_RUNS"] = str(options.work.absolute() / "runs")
    base_file = options.base or write_demo_base(options.work)
    arms = list(dict.fromkeys(options.arms))
    try:
        interviews = [plan_arm(arm, base_file) for arm in arms]
    except RequestError as error:
        sys.exit(f"learning: {error}")
    judge = Judge(base_file, options.work)
    before = {"arm": "before", "run": "before", "classifier_accuracy": judge.accuracy}
    measure(judge, load_unet(judge.base, torch.float32), before, options.work)
    with ThreadPoolExecutor(options.at_once) as pool:
        for interview, arm, (run, seconds) in zip(interviews, arms, pool.map(train_arm, interviews)):
            line = {"arm": arm, "run": run.name} | {name: getattr(interview.plan, name) for name in REPORTED}
            line["seconds"] = round(seconds, 1)
            if read_state(run)["state"] != "done":
                report(line | {"failed": read_state(run).get("message") or f"see {run.log}"}, options.work)
                continue
            unet = load_unet(judge.base, torch.float32)
            merge_lora(unet, run.result)
            measure(judge, unet, line, options.work)


def _pixels(pictures: dict[str, np.ndarray], names: list[str]) -> Tensor:
    """(N, 3, 128, 128) in [-1, 1]."""
    return torch.from_numpy(np.stack([pictures[name] for name in names])).permute(0, 3, 1, 2).float() / 127.5 - 1


if __name__ == "__main__":
    main()
