"""What the loop is given: size conditioning by hand, captions with the trigger, repeats, and only cached tensors."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from crumb.engine.data import prepare as prepare_module
from crumb.engine.data.images import crop_picture, load_rgb, to_tensor
from crumb.engine.data.prepare import caption_findings, prepare, time_ids
from crumb.engine.memory.placement import Placement
from crumb.engine.model.load import load_text_encoders, load_vae
from crumb.engine.model.text import encode_prompts
from crumb.engine.network.metadata import lora_metadata
from crumb.engine.run.events import EventWriter, read_events
from crumb.profiles.base_model import inspect_base_model
from crumb.profiles.buckets import assign
from crumb.profiles.dataset import scan_pictures, scan_subsets
from crumb.profiles.pictures import Picture
from crumb.profiles.plan import Plan
from crumb.profiles.subsets import effective_subsets

PLACEMENT = Placement(torch.device("cpu"), torch.float32)


def test_time_ids_by_hand():
    """1500x1000 trains at 1216x832: scaled by 0.832 to 1248x832, so 16 pixels go on the left and none on top."""
    wide = Picture(Path("p.png"), 1500, 1000, 1, None, None)
    assert time_ids(wide, assign(1500, 1000, 1024)) == [1000, 1500, 0, 16, 832, 1216]
    tall = Picture(Path("p.png"), 1000, 1500, 1, None, None)
    assert time_ids(tall, assign(1000, 1500, 1024)) == [1500, 1000, 16, 0, 1216, 832]


def test_time_ids_say_where_the_crop_lies_in_the_picture_as_shown():
    """Every pixel of 137x128 holds its own place; at 128 pixels 4 are cut on one side and 5 on the other."""
    x, y = np.meshgrid(np.arange(137), np.arange(128))
    image = Image.fromarray(np.dstack([x, y, np.zeros_like(x)]).astype(np.uint8))
    picture, crop = Picture(Path("p.png"), 137, 128, 1, None, None), assign(137, 128, 128)
    assert (crop.width, crop.height, crop.resized_width) == (128, 128, 137)
    plain = np.asarray(crop_picture(image, crop))
    assert time_ids(picture, crop) == [128, 137, plain[0, 0, 1], plain[0, 0, 0], 128, 128] == [128, 137, 0, 4, 128, 128]
    shown = plain[:, ::-1]
    # The same picture, mirrored first: its own left edge is column 136 of the file.
    left_in_mirrored = 136 - int(shown[0, 0, 0])
    assert time_ids(picture, crop, mirrored=True) == [128, 137, 0, left_in_mirrored, 128, 128] == [128, 137, 0, 5, 128, 128]


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
    seen = Counter(index for indices in training_set.epoch.trained.values() for index in indices)
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


@pytest.fixture
def folders(tmp_path):
    """Own pictures: one plain, one masked on its right half; a face folder; regularization pictures, one of them captioned."""
    for place in ("own/plain", "own/masked", "faces/face", "reg/r1", "reg/r2", "reg/r3"):
        path = tmp_path / f"{place}.png"
        path.parent.mkdir(exist_ok=True)
        Image.effect_noise((141, 128), 90).convert("RGB").save(path)
    mask = Image.new("L", (141, 128))
    mask.paste(255, (70, 0, 141, 128))
    mask.save(tmp_path / "own/masked-masklabel.png")
    (tmp_path / "own/plain.txt").write_text("a cat")
    (tmp_path / "reg/r1.txt").write_text("some dog")
    return tmp_path


@pytest.fixture
def prepare_from(folders, tiny_base):
    """prepare() for the plan of these settings; returns the set, its pictures' names to indices, and the events."""
    def prepared(**settings):
        plan = Plan(**{
            "name": "t", "created": "2026-01-01T00:00:00+00:00", "base_model": str(tiny_base), "resolution": 128,
            "images": str(folders / "own"), "trigger": "ohwx", "class_word": "cat", "repeats": 2, "batch_size": 4} | settings)
        events = folders / "events.jsonl"
        events.unlink(missing_ok=True)
        scan = scan_subsets(effective_subsets(plan))
        training_set = prepare(plan, inspect_base_model(tiny_base), scan, PLACEMENT, EventWriter(events),
                               lambda phase: lambda done, total: None)
        names = {picture.path.stem: index for index, picture in enumerate(training_set.pictures)}
        return training_set, names, read_events(events)[0]
    return prepared


def test_subsets_give_captions_repeats_weights_and_turns(folders, prepare_from):
    training_set, at, events = prepare_from(
        regularization=str(folders / "reg"), prior_loss_weight=0.25,
        subsets=[{"images": str(folders / "faces"), "repeats": 3, "trigger": "zwx", "class_word": "face", "loss_weight": 2.0}])
    captions = {name: training_set.captions[index] for name, index in at.items()}
    assert captions == {"masked": "ohwx cat", "plain": "ohwx, a cat", "face": "zwx face", "r1": "some dog", "r2": "cat",
                        "r3": "cat"}
    seen = Counter(index for indices in training_set.epoch.trained.values() for index in indices)
    assert seen == {at["plain"]: 2, at["masked"]: 2, at["face"]: 3}
    assert training_set.epoch.num_regularization == 7 and training_set.num_batches(4) == 4
    assert training_set.batch([at["plain"], at["face"], at["r1"]]).weights.tolist() == [1.0, 2.0, 0.25]
    assert training_set.regularization == [at["r1"], at["r2"], at["r3"]]
    assert training_set.trained == [at["masked"], at["plain"], at["face"]]
    told = {Path(event["path"]).stem: event for event in events if event["type"] == "picture"}
    assert (told["face"]["repeats"], told["face"]["loss_weight"], told["r1"]["regularization"]) == (3, 2.0, True)
    assert any("not full (128x128: 2 of 4)" in event["text"] for event in events if event["type"] == "warning")


def test_mirrored_views(prepare_from, tiny_base):
    """Latents of the mirrored picture, its time ids, and its mask the other way round."""
    training_set, at, _ = prepare_from(flip=True, masked_loss="files", held_out_pictures=0)
    indices = [at["masked"], at["plain"]]
    plain, mirrored = training_set.batch(indices), training_set.batch(indices, [True, True])
    vae = load_vae(inspect_base_model(tiny_base), None, torch.float32)
    for row, index in enumerate(indices):
        pixels = to_tensor(crop_picture(load_rgb(training_set.pictures[index].path), training_set.crops[index]))
        with torch.no_grad():
            posterior = vae.encode(torch.stack([pixels, pixels.flip(-1)])).latent_dist
        for batch, mean in ((plain, posterior.mean[0]), (mirrored, posterior.mean[1])):
            torch.testing.assert_close(batch.latent_mean[row], mean, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain.latent_mean, mirrored.latent_mean)
    assert (plain.time_ids[0].tolist(), mirrored.time_ids[0].tolist()) == (
        [128, 141, 0, 6, 128, 128], [128, 141, 0, 7, 128, 128])
    assert torch.equal(mirrored.masks, plain.masks.flip(-1)) and not torch.equal(mirrored.masks, plain.masks)
    half = training_set.batch(indices, [False, True])
    assert torch.equal(half.latent_mean[0], plain.latent_mean[0]) and torch.equal(half.latent_mean[1], mirrored.latent_mean[1])


@pytest.mark.parametrize(("settings", "wide", "small"), [
    ({}, (8, 24), (8, 8)), ({"buckets": False}, (16, 16), (8, 8)), ({"upscale": True}, (8, 24), (16, 16)),
    ({"resolution": 64}, (8, 8), (8, 8))])
def test_sizes_follow_the_plan(folders, prepare_from, settings, wide, small):
    """300x150 and 100x90: of 128x128's area 192x64 is nearest to 2:1, and 64x64 the largest that needs no enlarging."""
    for name, size in {"wide": (300, 150), "small": (100, 90)}.items():
        (folders / "sizes").mkdir(exist_ok=True)
        Image.effect_noise(size, 90).save(folders / "sizes" / f"{name}.png")
    training_set, at, _ = prepare_from(images=str(folders / "sizes"), **settings)
    got = {name: tuple(training_set.batch([at[name]]).latent_mean.shape[-2:]) for name in ("wide", "small")}
    assert got == {"wide": wide, "small": small}


@pytest.mark.parametrize("vae_tiling", [False, True])
def test_the_plans_vae_encodes_and_in_tiles_where_it_says_so(folders, prepare_from, other_vae, vae_tiling):
    """Against diffusers' VAE of that folder; the picture is larger than a tile, and tiles give something else."""
    (folders / "large").mkdir()
    Image.effect_noise((640, 128), 90).convert("RGB").save(folders / "large" / "a.png")
    training_set, at, _ = prepare_from(images=str(folders / "large"), resolution=320, vae=str(other_vae.folder),
                                       vae_tiling=vae_tiling)
    pixels = torch.tensor(np.asarray(Image.open(folders / "large" / "a.png"), np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
    with torch.no_grad():
        means = [vae.encode(pixels).latent_dist.mean for vae in (other_vae.whole, other_vae.tiled)]
    got = training_set.batch([at["a"]]).latent_mean
    differences = [((got - mean).abs().max() / mean.abs().max()).item() for mean in means]
    assert differences[vae_tiling] < 1e-4, f"differs from the VAE's own latents by {differences[vae_tiling]:.1e} of the largest"
    assert differences[not vae_tiling] > 1e-2, "whole and in tiles is all the same here, so nothing was compared"


def test_as_many_texts_of_a_caption_as_the_plan_says(folders, prepare_from):
    """Ten tags can be shuffled in millions of ways: as many texts are encoded as shown, and they are the seed's."""
    (folders / "own/plain.txt").write_text(", ".join("abcdefghij"))
    seen = {}
    for seed in (1, 2):
        training_set, at, events = prepare_from(shuffle_captions=True, caption_variants=3, seed=seed)
        shown = {training_set.text(at["plain"], f"{view} 0") for view in range(100)}
        whole = {training_set.text(at["plain"]), training_set.text(at["masked"]), ""}
        assert len(shown) == 3 and set(training_set.prompt_paths) == shown | whole, (shown, set(training_set.prompt_paths))
        assert [event["num_texts"] for event in events if event["type"] == "texts"] == [3 + 2]
        seen[seed] = shown
    assert not seen[1] & seen[2]


def test_cached_captions_are_read_as_the_plan_says(folders, prepare_from, tiny_base):
    """At the plan's clip skip and length, with a warning where that cuts one; against an encoding without a cache."""
    (folders / "own/plain.txt").write_text("cat, " * 40)
    encoders = load_text_encoders(inspect_base_model(tiny_base), torch.float32)
    for clip_skip, length, words in ((3, 75, ["1 captions are longer than 75 tokens"]), (1, 150, [])):
        training_set, at, events = prepare_from(max_token_length=length, clip_skip=clip_skip)
        warnings = [event["text"] for event in events if event["type"] == "warning" and "tokens" in event["text"]]
        assert len(warnings) == len(words) and all(word in text for word, text in zip(words, warnings)), warnings
        with torch.no_grad():
            expected, pooled = encode_prompts(encoders, [training_set.text(at["plain"])], clip_skip, length)
        batch = training_set.batch([at["plain"]])
        assert expected.shape == (1, 77 * (length // 75), 128)
        torch.testing.assert_close(batch.encoder_hidden_states, expected)
        torch.testing.assert_close(batch.pooled, pooled)


def test_only_subsets_that_may_be_are_mirrored(folders, prepare_from):
    settings = {"subsets": [{"images": str(folders / "faces"), "flip": True}], "regularization": str(folders / "reg")}
    training_set, at, _ = prepare_from(**settings)
    assert list(training_set.mirrored_paths) == [at["face"]]
    plain = training_set.batch([at["plain"], at["face"]])
    wanted = training_set.batch([at["plain"], at["face"]], [True, True])
    assert torch.equal(wanted.latent_mean[0], plain.latent_mean[0]) and torch.equal(wanted.time_ids[0], plain.time_ids[0])
    assert not torch.equal(wanted.latent_mean[1], plain.latent_mean[1])
    settings |= {"flip": True, "subsets": [{"images": str(folders / "faces"), "flip": False}]}
    training_set, at, _ = prepare_from(**settings)
    assert set(training_set.mirrored_paths) == set(at.values()) - {at["face"]}


def test_masks_reach_the_batch(folders, prepare_from):
    training_set, at, events = prepare_from(masked_loss="files", regularization=str(folders / "reg"))
    assert list(training_set.mask_paths) == [at["masked"]]
    both = training_set.batch([at["masked"], at["plain"]]).masks
    # 141 columns, 6 cut on the left and 7 on the right: white begins at column 64 of 128, which is 8 of 16.
    assert both.shape == (2, 1, 16, 16) and both[0, :, :, :8].sum() == 0 and (both[0, :, :, 8:] == 1).all()
    assert (both[1] == 1).all() and training_set.batch([at["plain"], at["r1"]]).masks is None
    warnings = [event["text"] for event in events if event["type"] == "warning"]
    assert any("1 of 2 pictures" in text and "plain.png" in text for text in warnings), warnings
    told = {Path(event["path"]).stem: event["mask"] for event in events if event["type"] == "picture"}
    assert told["masked"].endswith("masked-masklabel.png") and told["plain"] is None
    assert prepare_from(masked_loss="off")[0].mask_paths == {}


def test_alpha_is_a_mask_of_the_picture_itself(folders, prepare_from):
    image = Image.open(folders / "own/plain.png").convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    image.save(folders / "own/plain.png")
    training_set, at, _ = prepare_from(masked_loss="alpha")
    assert list(training_set.mask_paths) == [at["plain"]]
    rows = training_set.batch([at["plain"]]).masks[0, 0].mean(1)
    expected = torch.tensor(np.asarray(image.getchannel("A"), np.float64)[:, 6:134].reshape(16, 8, -1).mean((1, 2)) / 255)
    torch.testing.assert_close(rows.double(), expected, atol=1e-6, rtol=0)


def test_held_out_pictures_are_never_regularization_pictures(folders, prepare_from):
    by_seed = []
    for seed in range(4):
        training_set, at, _ = prepare_from(regularization=str(folders / "reg"), held_out_pictures=1, seed=seed, flip=True)
        (held_out,) = training_set.held_out
        by_seed.append(held_out)
        assert held_out in (at["plain"], at["masked"]) and held_out not in training_set.trained
        assert held_out not in training_set.mirrored_paths and len(training_set.mirrored_paths) == 4
    assert set(by_seed) == {at["plain"], at["masked"]}, "the seed chooses"


def test_the_digest_covers_all_that_a_batch_is_made_of(folders, prepare_from):
    reg = {"regularization": str(folders / "reg")}
    variants = [
        {}, {"flip": True}, {"masked_loss": "files"}, reg, {**reg, "prior_loss_weight": 0.5},
        {"subsets": [{"images": str(folders / "faces")}]}, {"subsets": [{"images": str(folders / "faces"), "repeats": 5}]},
        {"subsets": [{"images": str(folders / "faces"), "loss_weight": 0.5}]}, {"repeats": 3},
    ]
    digests = [prepare_from(**settings)[0].digest() for settings in variants]
    assert len(set(digests)) == len(variants) and digests[0] == prepare_from()[0].digest()
    masked = prepare_from(masked_loss="files")[0].digest()
    Image.new("L", (141, 128), 200).save(folders / "own/masked-masklabel.png")
    assert prepare_from(masked_loss="files")[0].digest() != masked, "a mask painted anew is another run"
    assert prepare_from()[0].digest() == digests[0]


def test_metadata_name_the_folders(folders, prepare_from, make_plan):
    (folders / "reg" / "5_dogs").mkdir()
    (folders / "reg/r3.png").rename(folders / "reg/5_dogs/r3.png")
    settings = {"repeats": 2, "regularization": str(folders / "reg"), "prior_loss_weight": 0.25,
                "subsets": [{"images": str(folders / "faces"), "repeats": 3, "flip": True}]}
    training_set, _, _ = prepare_from(**settings)
    plan = make_plan(images=str(folders / "own"), **settings)
    indices = [*training_set.trained, *training_set.regularization]
    written = lora_metadata(plan, "hash", *([of_all[index] for index in indices] for of_all in (
        training_set.pictures, training_set.crops, training_set.captions)), step=28)
    assert json.loads(written["ss_dataset_dirs"]) == {
        "2_own": {"n_repeats": 2, "img_count": 2}, "3_faces": {"n_repeats": 3, "img_count": 1}}
    assert json.loads(written["ss_reg_dataset_dirs"]) == {
        "1_reg": {"n_repeats": 1, "img_count": 2}, "5_dogs": {"n_repeats": 5, "img_count": 1}}
    assert (written["ss_num_train_images"], written["ss_num_reg_images"]) == ("7", "7")
    assert (written["ss_prior_loss_weight"], written["ss_flip_aug"]) == ("0.25", "True")
    # 28 steps of one picture; an epoch is 7 training views and 7 of regularization pictures.
    assert written["ss_epoch"] == "2"
    assert "some dog" not in written["ss_tag_frequency"] and json.loads(written["ss_tag_frequency"])["2_own"]["ohwx"] == 1
    alone = replace(plan, regularization="", subsets=[])
    own = [index for index in indices if training_set.pictures[index].subset == 0]
    written = lora_metadata(alone, "hash", *([of_all[index] for index in own] for of_all in (
        training_set.pictures, training_set.crops, training_set.captions)), step=28)
    assert (written["ss_num_reg_images"], written["ss_reg_dataset_dirs"], written["ss_epoch"]) == ("0", "{}", "7")
    assert str(folders) not in json.dumps(written)


def test_captions_that_are_cut_are_named_with_the_mend(make_plan):
    subsets = effective_subsets(make_plan(trigger="ohwx"))
    pictures = [Picture(Path(f"{n}.png"), 128, 128, 1, caption, None)
                for n, caption in enumerate(["a cat", "cat, " * 60, "cat, " * 40, "supercalifragilistic " * 4])]
    (finding,) = caption_findings(pictures, subsets, 75)
    # 60 times "cat," is 120 tokens and 40 times 80, behind "ohwx," of a few
    assert finding.startswith("2 captions are longer than 75 tokens") and "1.png" in finding and "150 reads all" in finding
    assert caption_findings(pictures, subsets, 150) == []
