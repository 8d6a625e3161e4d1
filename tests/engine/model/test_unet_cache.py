"""Loading into formats: what a small machine gets is what a large one would make, and the cache never stands in the way."""

import errno
import hashlib
import os
import shutil
import stat
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from crumb.engine.model import tiny, unet_cache
from crumb.engine.model.frozen import FORMATS, IN_BLOCKS
from crumb.engine.model.load import load_unet
from crumb.engine.model.tiny import write_diffusers_folder
from crumb.engine.model.unet_cache import Entry
from crumb.kernels.quantize import Int8Weight, NF4Weight
from crumb.profiles.base_model import inspect_base_model
from crumb.profiles.errors import RequestError

MOST_BESIDE = 64 * 2**20
STREAMED = "down_blocks.1.attentions.0.transformer_blocks.0"


@pytest.fixture(scope="module")
def bases(tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts") / "folder"
    write_diffusers_folder(folder, tiny_base)
    return {"single_file": inspect_base_model(tiny_base), "diffusers": inspect_base_model(folder)}


@pytest.fixture
def cached(bases, tmp_path, monkeypatch):
    """Loads with a cache of its own. `warnings` are those of the last call; `path` is the entry, `num_quantised` a count."""
    monkeypatch.setenv("CRUMB_CACHE", str(tmp_path / "cache"))
    made = SimpleNamespace(path=Entry("abc", "nf4", torch.float16).path, warnings=[], num_quantised=0)
    of = NF4Weight.of

    def counted(weight):
        made.num_quantised += 1
        return of(weight)

    def load(**options):
        made.warnings.clear()
        made.num_quantised = 0
        return load_unet(bases["single_file"], torch.float16, "cpu", "nf4", base_sha256="abc", warn=made.warnings.append,
                         **options)
    monkeypatch.setattr(NF4Weight, "of", counted)
    made.load = load
    return made


def parts_of(weight) -> list[torch.Tensor]:
    """The tensors of a quantised weight, in the order of its fields; of an exact one it alone."""
    return [weight] if isinstance(weight, torch.Tensor) else [
        value for value in vars(weight).values() if isinstance(value, torch.Tensor)]


def contents(unet) -> dict[str, tuple]:
    """Strides, dtype and values of every tensor of the U-Net by name; quantised weights' under their fields' names."""
    found = dict(unet.state_dict())
    for name, module in unet.named_modules():
        weight = vars(module).get("weight")
        if weight is not None:
            found |= {f"{name}.{field}": value for field, value in vars(weight).items() if isinstance(value, torch.Tensor)}
            found[f"{name}.shape"] = torch.tensor(weight.shape)
    return {name: (tensor.stride(), tensor.dtype, digest_of(tensor)) for name, tensor in found.items()}


def digest_of(*tensors: torch.Tensor) -> str:
    return hashlib.sha256(b"".join(tensor.contiguous().view(-1).view(torch.uint8).numpy() for tensor in tensors)).hexdigest()


@pytest.mark.parametrize("layout", ["single_file", "diffusers"])
@pytest.mark.parametrize("quantise", ["int8", "nf4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_quantised_on_the_way_is_quantised_afterwards(bases, layout, quantise, dtype):
    expected = load_unet(bases[layout], dtype).to(memory_format=torch.channels_last)
    for name, module in expected.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and IN_BLOCKS.fullmatch(name):
            weight = module.weight.detach()
            del module.weight
            module.weight = FORMATS[quantise][weight.dim() == 4].of(weight)
    told = []
    unet = load_unet(bases[layout], dtype, "cpu", quantise, on_progress=lambda *progress: told.append(progress))
    assert contents(unet) == contents(expected)
    num_bytes = 2 * bases[layout].num_unet_parameters
    assert told == sorted(told) and told[-1] == (num_bytes, num_bytes)


def test_values_are_those_that_entries_were_made_of():
    """Where these change, ENTRY_FORMAT must change too: else runs go on with entries of the old values."""
    weight = torch.randn(96, 640, generator=torch.Generator().manual_seed(0))
    digests = {}
    for kind in (Int8Weight, NF4Weight):
        digests[kind] = digest_of(*parts_of(kind.of(weight)))[:16]
    assert (unet_cache.ENTRY_FORMAT, digests) == (1, {Int8Weight: "8759192187da908c", NF4Weight: "5888241811f3baad"})


def devices(unet) -> dict[str, set[str]]:
    """By module, the kinds of device that its own tensors are on."""
    return {name: {part.device.type for weight in (*module._parameters.values(), vars(module).get("weight"))
                   if weight is not None for part in parts_of(weight)} for name, module in unet.named_modules()}


@pytest.mark.parametrize("quantise", ["no", "nf4"])
def test_streamed_modules_stay_on_the_host(cached, bases, quantise):
    """Meta stands in for a GPU, where nothing can be quantised: in NF4 the U-Net comes from the cache."""
    cached.load()
    unet = load_unet(bases["single_file"], torch.float16, "meta", quantise, streamed=[STREAMED], base_sha256="abc")
    for name, found in devices(unet).items():
        assert found <= {"cpu" if f"{name}.".startswith(f"{STREAMED}.") else "meta"}, name
    assert devices(unet)[f"{STREAMED}.ff.net.0.proj"] == {"cpu"} and devices(unet)["conv_in"] == {"meta"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("quantise", ["int8", "nf4"])
def test_a_gpu_holds_the_result_and_one_tensor(bases, quantise):
    """And what it quantises is what the processor does."""
    expected, device = load_unet(bases["single_file"], torch.float16, "cpu", quantise), torch.device("cuda")
    largest = 2 * max(parameter.numel() for parameter in load_unet(bases["single_file"], torch.float16).parameters())
    pieces = 64 * 2**18
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    unet = load_unet(bases["single_file"], torch.float16, device, quantise, streamed=[STREAMED])
    peak, after = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    assert before < after <= peak <= after + largest + pieces
    assert devices(unet)[f"{STREAMED}.ff.net.0.proj"] == {"cpu"} and devices(unet)["conv_in"] == {"cuda"}
    for name, module in expected.named_modules():
        if (weight := vars(module).get("weight")) is not None:
            found = unet.get_submodule(name).weight
            assert all(map(torch.equal, parts_of(weight), [part.cpu() for part in parts_of(found)])), name


def test_a_second_start_reads_the_cache(cached):
    first = cached.load()
    assert cached.num_quantised > 50 and not cached.warnings
    assert stat.S_IMODE(cached.path.stat().st_mode) == 0o600 and stat.S_IMODE(cached.path.parent.stat().st_mode) == 0o700
    assert os.listdir(cached.path.parent) == [cached.path.name]
    told = []
    second = cached.load(on_progress=lambda *progress: told.append(progress))
    assert contents(second) == contents(first)
    assert cached.num_quantised == 0 and not cached.warnings
    assert told == sorted(told) and told[-1][0] == told[-1][1] > 0
    assert not second.training and [*dict(second.named_parameters())] == [*dict(first.named_parameters())]
    assert not any(parameter.requires_grad for parameter in second.parameters())
    with safe_open(cached.path, "pt") as file:  # a file that other programs can read
        assert sum(file.get_tensor(key).nbytes for key in file.keys()) == told[-1][1]  # noqa: SIM118


@pytest.mark.parametrize("damage", ["a value", "the header", "its end", "all", "another base", "a tensor"])
def test_a_damaged_entry_is_made_again(cached, damage):
    expected = contents(cached.load())
    data = cached.path.read_bytes()
    if damage == "another base":
        with safe_open(cached.path, "pt") as file:
            metadata = file.metadata() | {"base": "def"}
        save_file(load_file(cached.path), cached.path, metadata)
    elif damage == "a tensor":
        save_file({"a": torch.zeros(1)}, cached.path, {"base": "abc"})
    else:
        place = len(data) - 5 if damage == "a value" else 20
        spoiled = {"its end": data[:-100], "all": b"hello"}.get(damage, data[:place] + b"\x55" + data[place + 1:])
        cached.path.write_bytes(spoiled)
    assert contents(cached.load()) == expected
    assert len(cached.warnings) == 1 and "made again" in cached.warnings[0] and str(cached.path) in cached.warnings[0]
    assert cached.path.read_bytes() == data
    cached.load()
    assert cached.num_quantised == 0 and not cached.warnings


@pytest.mark.parametrize("refused", ["little room", "write", "fsync", "folder"])
def test_what_the_disk_refuses_costs_the_entry_only(cached, refused, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    if refused == "little room":
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2 * 2**30 + 1000))
    elif refused == "write":
        room = iter([1 << 40] * 400 + [0] * 1000)  # enough at first; another program takes the rest meanwhile
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=next(room)))
    elif refused == "fsync":
        monkeypatch.setattr(os, "fsync", refuse)
    else:
        cached.path.parent.write_bytes(b"") if cached.path.parent.parent.exists() else None
    unet = cached.load()
    monkeypatch.undo()
    assert unet.conv_in.weight.device.type == "cpu" and cached.num_quantised > 50
    assert len(cached.warnings) == 1 and "not kept" in cached.warnings[0]
    assert refused == "folder" or os.listdir(cached.path.parent) == []


def test_a_load_that_is_stopped_leaves_nothing_aside(cached):
    def stop(done, total):
        if done > total / 2:
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        cached.load(on_progress=stop)
    assert os.listdir(cached.path.parent) == []


def test_one_process_writes_and_what_a_killed_one_left_is_written_over(cached):
    aside = cached.path.parent / f".{cached.path.name}.part"
    aside.parent.mkdir(parents=True)
    aside.write_bytes(b"left by a process that was killed" * 10**6)
    holder = subprocess.Popen([sys.executable, "-c", "import fcntl, sys\nfile = open(sys.argv[1], 'ab')\n"
                               "fcntl.flock(file, fcntl.LOCK_EX)\nprint('held', flush=True)\nsys.stdin.read()", aside],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    holder.stdout.readline()
    cached.load()
    assert os.listdir(aside.parent) == [aside.name] and not cached.warnings
    holder.communicate()
    cached.load()
    assert os.listdir(aside.parent) == [cached.path.name]
    cached.load()
    assert cached.num_quantised == 0


def test_weights_that_are_no_numbers_are_named(tiny_base, tmp_path):
    tensors = load_file(tiny_base)
    name = "model.diffusion_model.middle_block.0.in_layers.2.weight"
    tensors[name][3, 2, 1, 0] = float("nan")
    save_file(tensors, tmp_path / "nan.safetensors")
    with pytest.raises(RequestError, match=r"mid_block.resnets.0.conv1.weight can't be quantised"):
        load_unet(inspect_base_model(tmp_path / "nan.safetensors"), torch.float32, "cpu", "int8")


MEASURE = """
import re, sys, threading, torch
from pathlib import Path
from crumb.engine.model.load import load_unet
from crumb.profiles.base_model import inspect_base_model

def anonymous_bytes():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

def measure(quantise):
    before, peak, stop = anonymous_bytes(), [0], threading.Event()
    def watch():
        while not stop.wait(0.002):
            peak[0] = max(peak[0], anonymous_bytes())
    watcher = threading.Thread(target=watch)
    watcher.start()
    unet = load_unet(base, torch.float16, "cpu", quantise, base_sha256="abc")
    stop.set()
    watcher.join()
    num_bytes = sum(weight.nbytes for weight in unet.parameters())
    num_bytes += sum(module.weight.num_bytes for module in unet.modules() if hasattr(vars(module).get("weight"), "num_bytes"))
    print(peak[0] - before, num_bytes)

base = inspect_base_model(sys.argv[1])
load_unet(inspect_base_model(sys.argv[2]), torch.float16, "cpu", "nf4")  # what torch itself takes at first use
for quantise in ("nf4", "nf4", "int8", "int8"):  # made, then read from the cache
    measure(quantise)
"""


@pytest.fixture(scope="module")
def middling_base(tmp_path_factory):
    """A base whose U-Net has 150 million weights: of zeros, which are made fast."""
    path = tmp_path_factory.mktemp("middling") / "base.safetensors"
    shape = tiny.Shape(**vars(tiny.TINY) | {"block_out_channels": (64, 256, 512), "transformer_depths": (0, 1, 3)})
    patch = pytest.MonkeyPatch()
    patch.setattr(tiny, "_random_tensor", lambda name, dims, generator: torch.zeros(dims))
    tiny.write_sdxl(path, shape)
    patch.undo()
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_holds_the_result_and_little_more(middling_base, tiny_base, tmp_path):
    done = subprocess.run([sys.executable, "-P", "-c", MEASURE, middling_base, tiny_base], capture_output=True, text=True,
                          check=True, env=os.environ | {"CRUMB_CACHE": str(tmp_path)})
    num_bytes_exact = 2 * inspect_base_model(middling_base).num_unet_parameters
    lines = done.stdout.splitlines()
    assert len(lines) == 4 and len(list(tmp_path.glob("unets/*"))) == 2
    for line in lines:
        peak, num_bytes = map(int, line.split())
        assert num_bytes_exact > num_bytes + 2 * MOST_BESIDE, "the base is too small to tell"
        assert peak < num_bytes + MOST_BESIDE, (peak, num_bytes, num_bytes_exact)
