"""The main job as a process: plan -> train -> file; the file judged by diffusers, the resume by its bytes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from crumb.engine.model.load import load_unet
from crumb.engine.network.lora import attach_lora
from crumb.engine.run.directory import RunDirectory
from crumb.engine.run.events import read_events
from crumb.profiles.base_model import inspect_base_model
from crumb.profiles.plan import load_plan

STEPS = 30
COMMON = ["--subject", "style", "--gpu", "cpu", "--trigger", "crumbtest", "--set", f"steps={STEPS}", "--set", "rank=4",
          "--set", "alpha=2", "--set", "sample_every=0", "--set", "save_every=10", "--set", "held_out_pictures=1"]


def crumb(*arguments, **environment):
    return subprocess.run([sys.executable, "-P", "-m", "crumb.wizard", *map(str, arguments)], capture_output=True, text=True,
                          env=os.environ | environment, check=False)


@pytest.fixture(scope="module")
def plan(tiny_base, photographs, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "plan.toml"
    done = crumb("plan", "--images", photographs, "--base", tiny_base, *COMMON, "--set", "learning_rate=1e-3",
                 "--set", "save_precision=float", "--set", "conv_rank=2", "--set", "shuffle_captions=true",
                 "--set", "caption_dropout=0.2", "--set", "caption_variants=3", "--out", path)
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture(scope="module")
def straight(plan, tmp_path_factory) -> RunDirectory:
    """30 steps without a break."""
    runs = tmp_path_factory.mktemp("straight")
    done = crumb("train", plan, "--plain", CRUMB_RUNS=str(runs))
    assert done.returncode == 0, done.stdout + done.stderr
    return RunDirectory(runs / "crumbtest")


def test_events_tell_the_whole_story(straight):
    events, _ = read_events(straight.events)
    types = [event["type"] for event in events]
    assert types.count("picture") == 6 and types.count("step") == STEPS and types[-1] == "finished"
    assert [e["step"] for e in events if e["type"] == "saved" and e["kind"] != "best"] == [10, 20, STEPS]
    assert json.loads(straight.state.read_text())["state"] == "done"
    losses = [event["loss"] for event in events if event["type"] == "step"]
    assert sum(losses[-10:]) < sum(losses[:10])


def test_every_judging_is_told_and_the_best_is_kept(straight):
    events, _ = read_events(straight.events)
    judged = [event for event in events if event["type"] == "judged"]
    assert [event["step"] for event in judged] == [0, 10, 20, STEPS]
    assert judged[-1]["training_loss"] < judged[0]["training_loss"] and judged[-1]["word"] and judged[-1]["basis"]
    best = min(judged[1:], key=lambda event: event["held_out_loss"])
    assert [event["step"] for event in judged if event["best"]][-1] == best["step"]
    kept = straight.result.with_stem(f"{straight.name}-best")
    assert kept.exists() == (best["step"] != STEPS)
    if kept.exists():
        assert kept.read_bytes() == (straight.checkpoints / f"step-{best['step']:06d}" / f"{straight.name}-step-"
                                     f"{best['step']:06d}.safetensors").read_bytes()
    metadata = safe_open(straight.result, "pt").metadata()
    assert metadata["ss_num_train_images"] == str(5 * int(json.loads(metadata["ss_dataset_dirs"]).popitem()[1]["n_repeats"]))


def test_diffusers_renders_the_saved_change_exactly(straight, plan, tiny_base):
    """Base and LoRA read by diffusers' own code against W + alpha/rank up @ down by hand, and against the trainer's U-Net."""
    loaded, merged, without_lora = diffusers_unet(tiny_base), diffusers_unet(tiny_base), diffusers_unet(tiny_base)
    state_dict, alphas = StableDiffusionXLPipeline.lora_state_dict(str(straight.result), unet_config=loaded.config)
    StableDiffusionXLPipeline.load_lora_into_unet(state_dict, network_alphas=alphas, unet=loaded)

    file = load_file(straight.result)
    stems = sorted({key.split(".")[0] for key in file})
    by_stem = {"lora_unet_" + ldm_name(name).replace(".", "_"): module for name, module in merged.named_modules()
               if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)}
    for stem in stems:
        down, up = file[f"{stem}.lora_down.weight"].double(), file[f"{stem}.lora_up.weight"].double()
        delta = up.flatten(1) @ down.flatten(1) * (file[f"{stem}.alpha"].item() / down.shape[0])
        weight = by_stem[stem].weight
        weight.data = (weight.data.double() + delta.reshape(weight.shape)).float()

    generator = torch.Generator().manual_seed(0)
    inputs = {"sample": torch.randn(2, 4, 16, 16, generator=generator), "timestep": torch.tensor([10, 900]),
              "encoder_hidden_states": torch.randn(2, 77, 128, generator=generator),
              "added_cond_kwargs": {"text_embeds": torch.randn(2, 64, generator=generator), "time_ids": torch.ones(2, 6)}}
    trained = load_unet(inspect_base_model(tiny_base), torch.float32)
    network = attach_lora(trained, load_plan(plan))
    assert sorted(network.layers) == stems
    for stem, layer in network.layers.items():
        layer.lora_A.data, layer.lora_B.data = file[f"{stem}.lora_down.weight"], file[f"{stem}.lora_up.weight"]
    with torch.no_grad():
        with_lora, by_hand = loaded(**inputs).sample, merged(**inputs).sample
        without, in_training = without_lora(**inputs).sample, trained(**inputs).sample
    difference = ((with_lora - by_hand).abs().max() / by_hand.abs().max()).item()
    change = ((by_hand - without).abs().max() / without.abs().max()).item()
    assert difference < 1e-5, f"diffusers renders something else: {difference:.2e}"
    from_training = ((in_training - by_hand).abs().max() / by_hand.abs().max()).item()
    assert from_training < 1e-5, f"the trainer saw another U-Net than diffusers renders: {from_training:.2e}"
    assert change > 1e-2, f"the LoRA changes next to nothing ({change:.2e}), so the comparison proves nothing"


def diffusers_unet(single_file: Path) -> UNet2DConditionModel:
    """The base's U-Net by diffusers' own converter; the config is written out, nothing of crumb's is used."""
    attention = ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"]
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(32, 64, 128), layers_per_block=2,
        down_block_types=["DownBlock2D", *attention],
        up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], transformer_layers_per_block=[1, 1, 2],
        attention_head_dim=[1, 1, 2], cross_attention_dim=128, use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=256, projection_class_embeddings_input_dim=64 + 6 * 256)
    converted = convert_ldm_unet_checkpoint(load_file(single_file), unet.config)
    unet.load_state_dict({name: tensor.float() for name, tensor in converted.items()}, strict=True)
    return unet.eval()


def ldm_name(name: str) -> str:
    """diffusers' module names to the original ones, written from the published map, not from crumb's."""
    inner = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
             "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
    parts = name.split(".")
    if parts[0] == "mid_block":
        slot = {"resnets0": 0, "attentions0": 1, "resnets1": 2}[parts[1] + parts[2]]
        return ".".join([f"middle_block.{slot}", *[inner.get(part, part) for part in parts[3:]]])
    if parts[0] in ("down_blocks", "up_blocks"):
        level, kind, index = int(parts[1]), parts[2], int(parts[3])
        if kind == "downsamplers":
            return f"input_blocks.{3 * level + 3}.0.op"
        if kind == "upsamplers":
            return f"output_blocks.{3 * level + 2}.2.conv"
        number = 3 * level + index + (parts[0] == "down_blocks")
        side = "input" if parts[0] == "down_blocks" else "output"
        rest = parts[4:] if kind == "attentions" else [inner.get(part, part) for part in parts[4:]]
        return ".".join([f"{side}_blocks.{number}.{int(kind == 'attentions')}", *rest])
    return name


def test_file_is_what_other_programs_expect(straight):
    with safe_open(straight.result, "pt") as file:
        metadata, keys = file.metadata(), list(file.keys())
        alphas = {file.get_tensor(key).item() for key in keys if key.endswith(".alpha") and "attn" in key}
        assert file.get_tensor(next(key for key in keys if key.endswith(".alpha"))).shape == ()
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0" and metadata["ss_output_name"] == "crumbtest"
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert alphas == {2.0}
    assert json.loads(metadata["ss_bucket_info"])["buckets"]
    assert str(Path.home()) not in json.dumps(metadata) and "/tmp" not in json.dumps(metadata)
    verified = crumb("verify", straight.result, "--json")
    report = json.loads(verified.stdout)
    assert verified.returncode == 0 and report["ok"] and not report["unmatched_keys"]


def test_kill_9_after_a_checkpoint_then_resume_gives_the_same_bytes(plan, straight, tmp_path):
    process = subprocess.Popen([sys.executable, "-P", "-m", "crumb.wizard", "train", str(plan), "--plain"],
                               env=os.environ | {"CRUMB_RUNS": str(tmp_path)}, stdout=subprocess.DEVNULL)
    run = RunDirectory(tmp_path / "crumbtest")
    wait_for(lambda: any(event["type"] == "step" and event["step"] >= 13 for event in read_events(run.events)[0]))
    engine_pid = json.loads(run.state.read_text())["pid"]
    os.kill(engine_pid, signal.SIGKILL)
    assert process.wait(30) == 1
    assert (run.checkpoints / "step-000010" / "state.json").exists() and not run.result.exists()

    listed = json.loads(crumb("runs", "--json", CRUMB_RUNS=str(tmp_path)).stdout)
    assert re.search("lost", json.dumps(listed))
    resumed = crumb("resume", "crumbtest", "--plain", CRUMB_RUNS=str(tmp_path))
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    starts = [event["step"] for event in read_events(run.events)[0] if event["type"] == "started"]
    assert starts == [0, 10]
    told = {event["step"]: event["held_out_loss"] for event in read_events(run.events)[0] if event["type"] == "judged"}
    assert told == {event["step"]: event["held_out_loss"] for event in read_events(straight.events)[0]
                    if event["type"] == "judged"}
    smoothed, expected = ({event["step"]: event["loss_smoothed"] for event in read_events(one.events)[0]
                           if event["type"] == "step"} for one in (run, straight))
    assert smoothed == expected
    assert run.result.read_bytes() == straight.result.read_bytes()


def test_stop_saves_and_resume_gives_the_same_bytes(plan, straight, tmp_path):
    process = subprocess.Popen([sys.executable, "-P", "-m", "crumb.wizard", "train", str(plan), "--plain"],
                               env=os.environ | {"CRUMB_RUNS": str(tmp_path)}, stdout=subprocess.PIPE, text=True)
    run = RunDirectory(tmp_path / "crumbtest")
    wait_for(lambda: any(event["type"] == "step" and event["step"] >= 4 for event in read_events(run.events)[0]))
    assert crumb("stop", "crumbtest", CRUMB_RUNS=str(tmp_path)).returncode == 0
    assert process.wait(60) == 3, process.stdout.read()
    assert crumb("resume", "crumbtest", "--plain", CRUMB_RUNS=str(tmp_path)).returncode == 0
    assert run.result.read_bytes() == straight.result.read_bytes()
    assert crumb("resume", "crumbtest", CRUMB_RUNS=str(tmp_path)).returncode == 2


def test_changed_plan_is_not_resumed(plan, tmp_path):
    crumb("train", plan, "--detach", CRUMB_RUNS=str(tmp_path))
    run = RunDirectory(tmp_path / "crumbtest")
    wait_for(lambda: any(event["type"] == "step" for event in read_events(run.events)[0]))
    crumb("stop", "crumbtest", CRUMB_RUNS=str(tmp_path))
    wait_for(lambda: json.loads(run.state.read_text())["state"] == "stopped")
    run.plan.write_text(run.plan.read_text().replace("seed = 42", "seed = 43"))
    resumed = crumb("resume", "crumbtest", "--plain", CRUMB_RUNS=str(tmp_path))
    assert resumed.returncode == 2 and "plan.toml" in resumed.stdout + resumed.stderr


def test_resume_refuses_other_pictures_and_allows_what_changes_no_result(plan, photographs, tmp_path):
    pictures = tmp_path / "pictures"
    shutil.copytree(photographs, pictures)
    own_plan = tmp_path / "own.toml"
    own_plan.write_text(plan.read_text().replace(str(photographs), str(pictures)))
    crumb("train", own_plan, "--detach", CRUMB_RUNS=str(tmp_path))
    run = RunDirectory(tmp_path / "crumbtest")
    wait_for(lambda: any(event["type"] == "step" for event in read_events(run.events)[0]))
    crumb("stop", "crumbtest", CRUMB_RUNS=str(tmp_path))
    wait_for(lambda: json.loads(run.state.read_text())["state"] == "stopped")
    step = json.loads(run.state.read_text())["step"]

    (pictures / "coffee.txt").write_text("something else")
    refused = crumb("resume", "crumbtest", "--plain", CRUMB_RUNS=str(tmp_path))
    assert refused.returncode == 2 and "set of pictures and captions" in refused.stdout + refused.stderr
    assert json.loads(run.state.read_text())["step"] == step > 0

    shutil.copy(photographs / "coffee.txt", pictures / "coffee.txt")
    run.plan.write_text("# a remark\n" + run.plan.read_text().replace("gradient_checkpointing = false",
                                                                      "gradient_checkpointing = true"))
    resumed = crumb("resume", "crumbtest", "--plain", CRUMB_RUNS=str(tmp_path))
    assert resumed.returncode == 0 and "recomputed in 34 blocks" in run.events.read_text()


def test_a_run_goes_on_from_a_lora_file(plan, straight, tmp_path):
    """The first measurement of the new run is the last one of the old: the same weights, at another rank and alpha."""
    again = tmp_path / "again.toml"
    text = plan.read_text().replace("rank = 4", "rank = 8", 1).replace("alpha = 2.0", "alpha = 8.0", 1).replace(
        'start_from = ""', f'start_from = "{straight.result}"').replace(f"steps = {STEPS}", "steps = 1")
    again.write_text(text)
    done = crumb("train", again, "--plain", CRUMB_RUNS=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    first, last = ([event for event in read_events(run.events)[0] if event["type"] == "judged"]
                   for run in (RunDirectory(tmp_path / "crumbtest"), straight))
    assert first[0]["training_loss"] == pytest.approx(last[-1]["training_loss"], rel=1e-5)
    assert first[0]["training_loss"] != pytest.approx(last[0]["training_loss"], rel=1e-5)
    again.write_text(text.replace(str(straight.result), str(tmp_path / "none.safetensors")))
    refused = crumb("train", again, "--plain", CRUMB_RUNS=str(tmp_path / "other"))
    assert refused.returncode == 2 and "none.safetensors" in refused.stderr


@pytest.fixture(scope="module")
def rich_plan(tiny_base, photographs, tmp_path_factory) -> Path:
    """Mirrored views, alpha masks, a subset, regularization pictures and learning text encoders, all at once."""
    folder = tmp_path_factory.mktemp("rich")
    for name in ("own", "more", "reg"):
        (folder / name).mkdir()
    for place, file in zip(("own", "own", "own", "more", "reg", "reg"), sorted(photographs.glob("*.jpg"))):
        image = Image.open(file).convert("RGBA")
        image.putalpha(Image.linear_gradient("L").resize(image.size))
        image.save(folder / place / f"{file.stem}.png")
        shutil.copy(file.with_suffix(".txt"), folder / place)
    done = crumb("plan", "--images", folder / "own", "--base", tiny_base, *COMMON, "--flip", "--set", "masked_loss=alpha",
                 "--subset", f"images={folder / 'more'},repeats=2,loss_weight=0.5,masked_loss=off",
                 "--set", f"regularization={folder / 'reg'}", "--set", "prior_loss_weight=0.25", "--set", "save_every=5",
                 "--set", "text_encoder_learning_rate=1e-4", "--set", "text_encoder_2_learning_rate=1e-4",
                 "--set", "sample_every=12", "--set", "sample_steps=2",
                 "--set", "steps=12", "--out", folder / "plan.toml")
    assert done.returncode == 0, done.stderr
    return folder / "plan.toml"


def test_flips_masks_and_regularization_resume_to_the_same_bytes_and_nothing_else(rich_plan, tmp_path):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    done = crumb("train", rich_plan, "--plain", CRUMB_RUNS=str(straight))
    assert done.returncode == 0, done.stdout + done.stderr
    events = read_events(straight / "crumbtest" / "events.jsonl")[0]
    (numbers,) = [event for event in events if event["type"] == "numbers"]
    assert (numbers["num_pictures"], numbers["num_regularization"]) == (4, 2)
    result = straight / "crumbtest" / "crumbtest.safetensors"
    ups = {key: tensor for key, tensor in load_file(result).items() if key.endswith("lora_up.weight")}
    for part in ("lora_unet", "lora_te1", "lora_te2"):
        assert all(tensor.abs().max() > 0 for key, tensor in ups.items() if key.startswith(part)), part
    assert sum(key.startswith("lora_te") for key in ups) > 12 and crumb("verify", result).returncode == 0
    metadata = safe_open(result, "pt").metadata()
    assert list(json.loads(metadata["ss_reg_dataset_dirs"])) == ["1_reg"] and metadata["ss_prior_loss_weight"] == "0.25"

    process = subprocess.Popen([sys.executable, "-P", "-m", "crumb.wizard", "train", str(rich_plan), "--plain"],
                               env=os.environ | {"CRUMB_RUNS": str(stopped)}, stdout=subprocess.DEVNULL)
    run = RunDirectory(stopped / "crumbtest")
    wait_for(lambda: any(event["type"] == "step" and event["step"] >= 3 for event in read_events(run.events)[0]))
    crumb("stop", "crumbtest", CRUMB_RUNS=str(stopped))
    assert process.wait(60) == 3
    good = run.plan.read_text()
    for old, new, word in [("flip = true", "flip = false", "plan.toml"), ("mask_floor = 0.0", "mask_floor = 0.5", "plan.toml"),
                           ("loss_weight = 0.5", "loss_weight = 0.6", "plan.toml"), ('/reg"', '/more"', "another of the")]:
        assert old in good
        run.plan.write_text(good.replace(old, new))
        refused = crumb("resume", "crumbtest", "--plain", CRUMB_RUNS=str(stopped))
        assert refused.returncode == 2 and word in refused.stdout + refused.stderr, (new, refused.stdout, refused.stderr)
    moved = rich_plan.parent.with_name("moved")
    shutil.copytree(rich_plan.parent, moved)
    run.plan.write_text(good.replace(str(rich_plan.parent), str(moved)))
    resumed = crumb("resume", "crumbtest", "--plain", CRUMB_RUNS=str(stopped))
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert run.result.read_bytes() == (straight / "crumbtest" / "crumbtest.safetensors").read_bytes()


def wait_for(condition, timeout_s: float = 90.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)
