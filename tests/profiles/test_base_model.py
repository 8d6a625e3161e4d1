import hashlib
import json
import math
import os

import pytest

from crumb.profiles import base_model
from crumb.profiles.base_model import fingerprint, inspect_base_model, read_header, weight_files
from crumb.profiles.errors import RequestError

UNET = "model.diffusion_model."
BYTES = {"F16": 2, "F32": 4, "BF16": 2, "F8_E4M3": 1}


def unet_shapes(deep=(1, 2), mid=None, in_channels=4):
    """A header's worth of an SDXL U-Net in LDM names; `deep` is the depth at 640 and at 1280."""
    depths = {f"input_blocks.{n}.1": deep[0] for n in (4, 5)} | {f"output_blocks.{n}.1": deep[0] for n in (3, 4, 5)}
    depths |= {f"input_blocks.{n}.1": deep[1] for n in (7, 8)} | {f"output_blocks.{n}.1": deep[1] for n in (0, 1, 2)}
    depths["middle_block.1"] = deep[1] if mid is None else mid
    blocks = {
        f"{m}.transformer_blocks.{i}.attn2.to_k.weight": [8, 16] for m, depth in depths.items() for i in range(depth)
    }
    return {"input_blocks.0.0.weight": [4, in_channels, 3, 3], "label_emb.0.0.weight": [4, 4], **blocks}


def with_prefix(prefix, shapes):
    return {prefix + name: shape for name, shape in shapes.items()}


TEXT = {
    "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight": [4, 4],
    "conditioner.embedders.1.model.ln_final.weight": [4],
}
VAE = {"encoder.conv_in.weight": [4, 3, 3, 3], "decoder.conv_in.weight": [4, 4, 3, 3]}
SDXL = with_prefix(UNET, unet_shapes()) | TEXT | with_prefix("first_stage_model.", VAE)


def write_header(path, shapes, dtype="F16", metadata=None, cut=0):
    """A safetensors file whose tensors are a hole in the file; `cut` bytes are missing at the end."""
    header, end = {"__metadata__": metadata} if metadata else {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end - cut)
    return path


def diffusers_folder(
    folder, scheduler=None, suffix=".safetensors", parts=("unet", "text_encoder", "text_encoder_2", "vae")
):
    stages = {1: 1, 2: 2}
    down = {f"down_blocks.{i}.attentions.{j}": n for i, n in stages.items() for j in range(2)}
    up = {f"up_blocks.{2 - i}.attentions.{j}": n for i, n in stages.items() for j in range(3)}
    depths = down | up | {"mid_block.attentions.0": 2}
    unet = {
        f"{m}.transformer_blocks.{i}.attn2.to_k.weight": [8, 16] for m, depth in depths.items() for i in range(depth)
    }
    unet |= {"conv_in.weight": [4, 4, 3, 3], "add_embedding.linear_1.weight": [4, 4]}
    shapes = {"unet": unet, "vae": VAE} | {
        part: {"final_layer_norm.weight": [4]} for part in ("text_encoder", "text_encoder_2")
    }
    for part in parts:
        stem = "model" if part.startswith("text") else "diffusion_pytorch_model"
        write_header(folder / part / (stem + suffix), shapes[part], "F32")
    (folder / "scheduler").mkdir()
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler or {}))
    return folder


LDM_15 = {UNET + "input_blocks.0.0.weight": [4, 4, 3, 3]}
KINDS = {
    "SD 1.5": LDM_15 | {"cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": [4, 4]},
    "SD 2.x": LDM_15 | {"cond_stage_model.model.ln_final.weight": [4]},
    "the SDXL refiner": LDM_15
    | {UNET + "label_emb.0.0.weight": [4], "conditioner.embedders.0.model.ln_final.weight": [4]},
    "SD3": {UNET + "joint_blocks.0.x_block.attn.qkv.weight": [4, 4]},
    "FLUX": {"double_blocks.0.img_attn.qkv.weight": [4, 4], "single_blocks.0.linear1.weight": [4, 4]},
    "a LoRA": {"lora_unet_input_blocks_4_1_proj_in.lora_down.weight": [4, 4]},
    "a VAE": VAE,
    "a text encoder": {"text_model.encoder.layers.0.mlp.fc1.weight": [4, 4]},
    "an SDXL U-Net alone": with_prefix(UNET, unet_shapes()),
    "an embedding": {"clip_l": [1, 768], "clip_g": [1, 1280]},
    "a ControlNet": {"control_model.input_blocks.0.0.weight": [4]},
    "an SDXL inpainting or editing model (9": with_prefix(UNET, unet_shapes(in_channels=9)) | TEXT,
    "a pruned SDXL": with_prefix(UNET, unet_shapes(deep=(1, 2), mid=0)) | TEXT,
    "of the EDM kind": SDXL | {"edm_mean": [1]},
    "of a kind that crumb does not know": {"model.layers.0.mlp.up_proj.weight": [4, 4]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_models_are_named_and_refused(kind, tmp_path):
    path = write_header(tmp_path / "model.safetensors", KINDS[kind])
    with pytest.raises(RequestError) as error:
        inspect_base_model(path)
    assert kind in str(error.value)
    assert "not an SDXL base model" in str(error.value) and str(path) in str(error.value)


def framed(header):
    return len(header).to_bytes(8, "little") + header


RAW = {
    "empty": (b"", "truncated"),
    "header cut": ((5000).to_bytes(8, "little") + b"{}", "has 10 bytes and its header promises 5,008"),
    "garbage": (b"garbage!" * 20, "not a .safetensors file"),
    "not json": (framed(b"nonsense"), "not a sound .safetensors"),
    "json list": (framed(b"[1, 2, 3"), "not a sound .safetensors"),
    "no offsets": (framed(b'{"a":{}}'), "not a sound .safetensors"),
    "zip": (b"PK\x03\x04" + b"\0" * 100, "pickled"),
    "pickle": (b"\x80\x02}q\x00X\x05\x00\x00\x00state", "pickled"),
    "web page": (b"<!DOCTYPE html><html></html>", "web page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
    "negative shape": (framed(b'{"a":{"dtype":"F16","shape":[-1],"data_offsets":[0,0]}}'), "impossible shape"),
    "backwards": (framed(b'{"a":{"dtype":"F16","shape":[1],"data_offsets":[2,0]}}'), "wrong extent"),
    "gguf": (b"GGUF\x03\0\0\0" + b"\0" * 64, "GGUF"),
}


@pytest.mark.parametrize("name", RAW)
def test_broken_and_foreign_files(name, tmp_path):
    content, expected = RAW[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(RequestError) as error:
        inspect_base_model(path)
    assert expected in str(error.value)


def test_refusals_of_paths_and_precisions(tmp_path):
    def refusal(path):
        with pytest.raises(RequestError) as error:
            inspect_base_model(path)
        return str(error.value)

    assert "no base model at" in refusal(tmp_path / "missing.safetensors")
    (tmp_path / "empty").mkdir()
    assert "not a diffusers one" in refusal(tmp_path / "empty")
    for suffix in (".ckpt", ".pt", ".pth", ".bin"):
        (tmp_path / f"model{suffix}").write_bytes(b"anything")
        assert "can run any code" in refusal(tmp_path / f"model{suffix}")
    cut = write_header(tmp_path / "cut.safetensors", SDXL, cut=7)
    size = cut.stat().st_size
    assert f"has {size:,} bytes and its header promises {size + 7:,}" in refusal(cut)
    assert "F8_E4M3" in refusal(write_header(tmp_path / "fp8.safetensors", SDXL, "F8_E4M3"))
    wrong = write_header(tmp_path / "wrong.safetensors", {"a": [2]})
    wrong.write_bytes(wrong.read_bytes().replace(b"[2]", b"[9]"))
    assert "wrong extent" in refusal(wrong)


def test_folder_refusals(tmp_path):
    cases = {
        "can run any code": diffusers_folder(tmp_path / "bin", suffix=".bin"),
        "SD 1.5 or SD 2.x": diffusers_folder(tmp_path / "sd15", parts=("unet", "text_encoder")),
        "the SDXL refiner": diffusers_folder(tmp_path / "refiner", parts=("unet", "text_encoder_2")),
        "prediction_type 'sample'": diffusers_folder(tmp_path / "sample", {"prediction_type": "sample"}),
    }
    for expected, folder in cases.items():
        with pytest.raises(RequestError, match=expected):
            inspect_base_model(folder)


SPEC = "modelspec.prediction_type"
PREDICTIONS = [
    ("model.safetensors", {}, None, (None, "no mark in the file")),
    ("noob-VPred-1.safetensors", {}, None, (None, "file name hints v-prediction")),
    ("a.safetensors", {"v_pred": [0]}, None, ("v_prediction", "tensor v_pred in the file")),
    ("a.safetensors", {}, {SPEC: "v"}, ("v_prediction", f"metadata {SPEC} is v")),
    ("v-pred.safetensors", {}, {SPEC: "epsilon"}, ("epsilon", f"metadata {SPEC} is epsilon")),
]


@pytest.mark.parametrize(("name", "extra", "metadata", "expected"), PREDICTIONS)
def test_prediction_type_of_a_file(name, extra, metadata, expected, tmp_path):
    base = inspect_base_model(write_header(tmp_path / name, SDXL | extra, metadata=metadata))
    assert (base.prediction_type, base.prediction_evidence) == expected


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_single_file(dtype, tmp_path):
    shapes = SDXL | {"ztsnr": [0]}
    base = inspect_base_model(
        write_header(tmp_path / "m.safetensors", shapes, dtype, {"modelspec.resolution": "128x128"})
    )
    assert (base.layout, base.dtype) == ("single_file", dtype.lower().replace("f", "fp").replace("bfp", "bf"))
    assert base.zero_terminal_snr and base.has_vae and base.native_resolution == 128
    assert base.num_unet_parameters == sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(UNET))
    without_vae = {name: shape for name, shape in SDXL.items() if not name.startswith("first_stage_model")}
    base = inspect_base_model(write_header(tmp_path / "n.safetensors", without_vae, dtype))
    assert not base.has_vae and not base.zero_terminal_snr and base.native_resolution == 1024


def test_diffusers_folder(tmp_path):
    scheduler = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    folder = diffusers_folder(tmp_path / "model", scheduler, ".fp16.safetensors")
    base = inspect_base_model(folder)
    assert (base.layout, base.dtype, base.prediction_type) == ("diffusers", "fp32", "v_prediction")
    assert base.zero_terminal_snr and base.has_vae and base.native_resolution == 1024

    (folder / "unet/diffusion_pytorch_model.fp16.safetensors").rename(folder / "unet/part-1.safetensors")
    write_header(folder / "unet/part-2.safetensors", {"extra.weight": [4]}, "F32")
    index = {"weight_map": {"conv_in.weight": "part-1.safetensors", "extra.weight": "../unet/part-2.safetensors"}}
    (folder / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert [file.name for file in weight_files(folder, "unet")] == ["part-1.safetensors", "part-2.safetensors"]
    assert inspect_base_model(folder).num_unet_parameters == base.num_unet_parameters + 4
    (folder / "unet/part-2.safetensors").unlink()
    with pytest.raises(RequestError, match="part-2"):
        inspect_base_model(folder)


def test_header_is_all_that_is_read(tmp_path):
    shapes = SDXL | {"conditioner.embedders.1.model.huge": [2**20, 2**10]}
    path = write_header(tmp_path / "m.safetensors", shapes, metadata={"a": "b"})
    tensors, metadata = read_header(path)
    assert metadata == {"a": "b"} and {name: info["shape"] for name, info in tensors.items()} == shapes
    assert path.stat().st_size > 2**31


def test_a_header_length_that_looks_like_a_pickle(tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(framed(b"{}".ljust(0x010280)))
    assert path.read_bytes()[:3] == b"\x80\x02\x01" and read_header(path) == ({}, {})


def test_fingerprint_is_the_file_hash_and_is_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("CRUMB_CACHE", str(tmp_path / "cache"))
    path = write_header(tmp_path / "m.safetensors", SDXL)
    calls = []
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    assert fingerprint(path, lambda *step: calls.append(step)) == expected
    assert calls[-1] == (path.stat().st_size, path.stat().st_size)
    with monkeypatch.context() as patch:
        patch.setattr(base_model, "_chunks", None)
        assert fingerprint(path) == expected
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\1")
    os.utime(path, ns=(1, 1))
    assert fingerprint(path) == hashlib.sha256(path.read_bytes()).hexdigest() != expected
    (tmp_path / "cache/fingerprints.json").write_text("broken")
    folder = diffusers_folder(tmp_path / "folder")
    before = fingerprint(folder)
    (tmp_path / "folder/unet/config.json").write_text("{}")
    assert before == fingerprint(diffusers_folder(tmp_path / "same")) != fingerprint(folder)
    alone = fingerprint(folder / "vae")
    write_header(folder / "vae/diffusion_pytorch_model.safetensors", VAE | {"extra": [1]})
    assert fingerprint(folder / "vae") != alone
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(("said", "resolution"), [
    ("1024x1024", 1024), ("128x128", 128), ("1216x832", 1024), ("1000x1000", 1024), ("32x32", 1024), ("9000x9000", 1024),
    ("large", 1024), (None, 1024)])
def test_native_resolution_is_one_that_a_plan_takes(tmp_path, said, resolution):
    metadata = {"modelspec.resolution": said} if said else {}
    path = write_header(tmp_path / "m.safetensors", SDXL, metadata=metadata)
    assert inspect_base_model(path).native_resolution == resolution
