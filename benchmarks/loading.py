"""How long a full-size SDXL U-Net takes to load on the processor, and in how much memory: as it is, in int8, in NF4.

    python -P benchmarks/loading.py FOLDER [--arms "int8" "int8, again" ...] [--dtype bf16] [--out docs/loading.jsonl]

FOLDER gets a single file of random weights (6.9 GB, once) and a cache of its own (4.1 GB). Each arm is a process of its own;
the file is put out of the system's page cache first, so that its bytes come from the disk. A line an arm: seconds, seconds of
the processor, anonymous memory before loading and at its peak (sampled 100 times a second), peak resident memory (with pages
of files that are mapped), bytes of the result.

"afterwards" arms hold the whole U-Net in 16 bits and then quantise it. The others do it tensor by tensor: "not kept" arms
leave the cache alone, those of a format's bare name write it, "again" arms read it.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path

HOW = (", afterwards", ", not kept", "", ", again")
ARMS = ("16 bits", *(quantise + how for quantise in ("int8", "nf4") for how in HOW))
DTYPES = ("fp16", "bf16")
VERSIONS = ("torch", "diffusers", "safetensors")


def status_bytes(key: str) -> int:
    return int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def load(arm: str, file: Path, dtype_name: str) -> dict:
    """One arm, in this process."""
    import torch

    from crumb.engine.model.load import load_unet
    from crumb.profiles.base_model import inspect_base_model

    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype_name]
    quantise, _, how = arm.replace("16 bits", "no").partition(", ")
    before, peak, stop = status_bytes("RssAnon"), [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.01):
            peak[0] = max(peak[0], status_bytes("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    started, cpu_started = time.monotonic(), time.process_time()
    base = inspect_base_model(file)
    if how == "afterwards":
        unet = load_unet(base, dtype)
        quantise_afterwards(unet, quantise)
    else:
        unet = load_unet(base, dtype, "cpu", quantise, base_sha256="benchmark" if how in ("", "again") else None)
    seconds, cpu_seconds = time.monotonic() - started, time.process_time() - cpu_started
    stop.set()
    watcher.join()
    num_bytes = sum(weight.nbytes for weight in unet.parameters()) + sum(
        weight.num_bytes for module in unet.modules() if hasattr(weight := vars(module).get("weight"), "num_bytes"))
    return {"arm": arm, "dtype": dtype_name, "seconds": round(seconds, 1), "cpu_seconds": round(cpu_seconds, 1),
            "anonymous_bytes_before": before, "peak_anonymous_bytes": peak[0], "peak_resident_bytes": status_bytes("VmHWM"),
            "result_bytes": num_bytes, "threads": torch.get_num_threads()}


def quantise_afterwards(unet, quantise: str) -> None:
    from crumb.engine.model.frozen import format_of
    from crumb.engine.model.weights import place

    for name in [name for name, _ in unet.named_parameters()]:
        weight = unet.get_parameter(name)
        if quantised := format_of(name, weight.shape, quantise):
            place(unet, name, quantised.of(weight.detach()))


def measure(arm: str, folder: Path, dtype: str) -> dict:
    """One arm, in a process of its own."""
    entries = list((folder / "cache").glob("unets/*"))
    if not arm.endswith("again"):
        for entry in entries:
            if f"-{arm}-" in entry.name:
                entry.unlink()
    for file in (folder / "sdxl.safetensors", *entries):
        forget_pages(file)
    done = subprocess.run([sys.executable, "-P", __file__, str(folder), "--one", arm, "--dtype", dtype], check=True,
                          stdout=subprocess.PIPE, text=True, env=os.environ | {"CRUMB_CACHE": str(folder / "cache")})
    versions = {"python": ".".join(map(str, sys.version_info[:3])), **{name: version(name) for name in VERSIONS}}
    return json.loads(done.stdout.splitlines()[-1]) | {"machine": f"{os.cpu_count()} cores, CPU", "versions": versions}


def forget_pages(file: Path) -> None:
    if not file.exists():
        return
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def make_base(file: Path) -> None:
    from crumb.engine.model.tiny import SDXL, write_sdxl

    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_sdxl(file, SDXL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="what the U-Net computes in; the file is fp16")
    parser.add_argument("--out", type=Path, default=Path("docs/loading.jsonl"))
    parser.add_argument("--one", choices=ARMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(load(options.one, options.folder / "sdxl.safetensors", options.dtype)))
        return
    make_base(options.folder / "sdxl.safetensors")
    with options.out.open("a") as out:
        for arm in options.arms:
            line = measure(arm, options.folder, options.dtype)
            out.write(json.dumps(line) + "\n")
            out.flush()
            print(f"{arm:<18} {line['seconds']:6.1f} s ({line['cpu_seconds']:.1f} s of the processor), anonymous "
                  f"{line['peak_anonymous_bytes'] / 2**20:,.0f} MiB at most, {line['anonymous_bytes_before'] / 2**20:,.0f} "
                  f"before; resident {line['peak_resident_bytes'] / 2**20:,.0f}; result "
                  f"{line['result_bytes'] / 2**20:,.0f}", flush=True)


if __name__ == "__main__":
    main()
