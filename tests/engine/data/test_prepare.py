"""What the loop is given: size conditioning by hand, captions with the trigger, repeats, and only cached tensors."""

from collections import Counter
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from crumb.engine.data import prepare as prepare_module
from crumb.engine.data.prepare import prepare, time_ids
from crumb.engine.memory.placement import Placement
from crumb.engine.model.load import load_text_encoders
from crumb.engine.model.text import encode_prompts
from crumb.engine.run.events import EventWriter, read_events
from crumb.profiles.base_model import inspect_base_model
from crumb.profiles.buckets import assign
from crumb.profiles.dataset import Picture, scan_pictures
from crumb.profiles.plan import Plan

PLACEMENT = Placement(torch.device("cpu"), torch.float32, False)


def test_time_ids_by_hand():
    """1500x1000 trains at 1216x832: scaled by 0.832 to 1248x832, so 16 pixels go on the left and none on top."""
    wide = Picture(Path("p.png"), 1500, 1000, 1, None, None)
    assert time_ids(wide, assign(1500, 1000, 1024)) == [1000, 1500, 0, 16, 832, 1216]
    tall = Picture(Path("p.png"), 1000, 1500, 1, None, None)
    assert time_ids(tall, assign(1000, 1500, 1024)) == [1500, 1000, 16, 0, 1216, 832]


def test_order_is_that_of_diffusers():
    """diffusers: original size (h, w) + crop (top, left) + target size (h, w)."""
    picture, crop = Picture(Path("p.png"), 1500, 1000, 1, None, None), assign(1500, 1000, 1024)
    pipeline = StableDiffusionXLPipeline.__new__(StableDiffusionXLPipeline)
    unet = type("U", (), {"config": type("C", (), {"addition_time_embed_dim": 256})(), "add_embedding": type("E", (), {
        "linear_1": torch.nn.Linear(2816, 1)})()})()
    object.__setattr__(pipeline, "unet", unet)
    theirs = pipeline._get_add_time_ids((1000, 1500), (crop.top, crop.left), (crop.height, crop.width), torch.float32, 1280)
    assert theirs[0].tolist() == time_ids(picture, crop)


def test_prepared_set(tiny_base, tmp_path, monkeypatch):
    folder = tmp_path / "pictures" / "3_cats"
    folder.mkdir(parents=True)
    Image.effect_noise((300, 200), 90).convert("RGB").save(folder / "a.png")
    Image.effect_noise((200, 300), 90).convert("RGB").save(folder.parent / "b.png")
    (folder / "a.txt").write_text("a cat")
    plan = Plan(name="t", created="2026-01-01T00:00:00+00:00", base_model=str(tiny_base), images=str(folder.parent),
                resolution=128, trigger="ohwx", class_word="cat", repeats=2, sample_prompts=["ohwx cat"])
    base, events = inspect_base_model(tiny_base), EventWriter(tmp_path / "events.jsonl")

    def prepared():
        return prepare(plan, base, scan_pictures(folder.parent), PLACEMENT, events, lambda phase: lambda done, total: None)

    training_set = prepared()
    by_name = {picture.path.name: index for index, picture in enumerate(training_set.pictures)}
    assert [training_set.captions[by_name[name]] for name in ("a.png", "b.png")] == ["ohwx, a cat", "ohwx cat"]
    seen = Counter(index for indices in training_set.buckets.values() for index in indices)
    assert seen == {by_name["a.png"]: 6, by_name["b.png"]: 2}

    batch = training_set.batch([by_name["a.png"]])
    crop = training_set.crops[by_name["a.png"]]
    with torch.no_grad():
        hidden, pooled = encode_prompts(load_text_encoders(base, torch.float32), ["ohwx, a cat"])
    torch.testing.assert_close(batch.encoder_hidden_states, hidden)
    torch.testing.assert_close(batch.pooled, pooled)
    assert batch.latent_mean.shape == (1, 4, crop.height // 8, crop.width // 8)
    assert batch.time_ids.tolist() == [[200, 300, crop.top, crop.left, crop.height, crop.width]]

    told = {Path(event["path"]).name: event for event in read_events(tmp_path / "events.jsonl")[0]
            if event["type"] == "picture"}
    assert told["a.png"]["size"] == [300, 200] and told["a.png"]["bucket"] == [crop.width, crop.height]

    def refuse(*arguments):
        raise AssertionError("the second time everything comes from the cache")
    monkeypatch.setattr(prepare_module, "load_vae", refuse)
    monkeypatch.setattr(prepare_module, "load_text_encoders", refuse)
    assert prepared().latent_paths == training_set.latent_paths
