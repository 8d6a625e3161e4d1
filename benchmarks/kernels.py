"""crumb's kernels against what other trainers run, each on the sizes of an SDXL training step at 1024 x 1024.

    python -P benchmarks/kernels.py                  all groups; needs a CUDA GPU
    python -P benchmarks/kernels.py --only linear    of linear, norm, block, optimizer
    python -P benchmarks/kernels.py --cpu --quick    tiny sizes: tries the script itself, the times mean nothing

One process, arms in turns on the same tensors (kernel_arms/timing.py: how times are taken). An arm whose package is missing
or that fails says so in its row. Results go to OUT/<device>-<date>/kernels.json and kernels.md after every case's group, so
that a run that is cut short leaves those it had.
"""

import argparse
import gc
import json
import os
import re
import subprocess
import sys
import time
from contextlib import suppress
from datetime import date
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent / "kernel_arms"))

from kernel_tables import summary, tables
from timing import BROKE, BrokenDevice, Stopwatch, measure

from crumb.kernels.dispatch import OPERATIONS, way

HERE = Path(__file__).parent
GROUPS = {"linear": "linears", "norm": "norms", "block": "blocks", "optimizer": "optimizers"}
PACKAGES = ("torch", "triton", "bitsandbytes", "peft", "diffusers", "prodigyopt")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(GROUPS), help="groups, with commas between")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--quick", action="store_true", help="5 warm-up and 20 timed runs for 25 and 100")
    parser.add_argument("--all", action="store_true", help="ranks 8 and 128 as well, and torch.compile")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no case after this time")
    parser.add_argument("--resume", action="store_true", help="keep today's rows and run the cases that have none")
    parser.add_argument("--cpu", action="store_true", help="tiny sizes on the processor")
    settings = parser.parse_args(argv)
    groups = settings.only.split(",")
    if unknown := set(groups) - set(GROUPS):
        parser.error(f"no group {', '.join(sorted(unknown))}: there are {', '.join(GROUPS)}")
    if not (settings.cpu or torch.cuda.is_available()):
        print("This needs a CUDA GPU, and torch finds none; --cpu --quick tries the script itself.", file=sys.stderr)
        return 2
    device = torch.device("cpu") if settings.cpu else torch.device("cuda", torch.cuda.current_device())
    dtype = torch.float16 if device.type == "cuda" and torch.cuda.get_device_capability() < (8, 0) else torch.bfloat16
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # for the references in fp32
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warmups, runs = (2, 2) if settings.cpu else (5, 20) if settings.quick else (25, 100)

    about = describe(device, dtype) | {"warmups": warmups, "runs": runs}
    folder = settings.out / f"{slug(about['device'])}-{date.today():%Y%m%d}"
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    if settings.resume:
        rows = json.loads((folder / "kernels.json").read_text())["rows"]
    start, status = time.perf_counter(), 0
    stopwatch = Stopwatch(device, warmups, runs)
    load_packages()
    for group in groups:
        try:
            run_group(group, rows, stopwatch, dtype, settings, start + settings.minutes * 60)
        except BrokenDevice as broken:
            rows += broken.rows or [{"group": group, "case": "-", "arm": "-", "error": str(broken)}]
            status = 3
        except Exception as error:
            rows.append({"group": group, "case": "-", "arm": "-", "error": stopwatch.survived(error, "-")})
            status = 1
        about["seconds"] = round(time.perf_counter() - start)
        (folder / "kernels.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
        (folder / "kernels.md").write_text(tables(about, rows))
        if status == 3:
            start_again(argv, settings, (time.perf_counter() - start) / 60)
    gc.unfreeze()  # otherwise Triton complains at exit about what it thinks has leaked
    print("\n".join(summary(about, rows)))
    print(f"{folder}/kernels.md, kernels.json")
    return status


def load_packages() -> None:
    """Before all else, so that Python's garbage collection need not look at what they bring: 0.6 s a case. The arms report
    what is missing."""
    for package in PACKAGES:
        with suppress(Exception):
            import_module(package)
    gc.collect()
    gc.freeze()


def start_again(argv: list[str] | None, settings: argparse.Namespace, minutes: float) -> None:
    """After a fault the GPU answers nothing in this process: a new one takes the cases that are left."""
    print("The GPU is gone for this process: the rest in a new one.", flush=True)
    given = [*(sys.argv[1:] if argv is None else argv), "--resume", "--minutes", str(settings.minutes - minutes)]
    os.execv(sys.executable, [sys.executable, "-P", str(HERE / "kernels.py"), *given])


def run_group(group: str, rows: list[dict[str, Any]], stopwatch: Stopwatch, dtype: torch.dtype, settings: argparse.Namespace,
              deadline: float) -> None:
    """Adds the rows of all cases that have none yet."""
    done = {(row["group"], row["case"]) for row in rows}
    broke = {row["arm"] for row in rows if str(row.get("error")).startswith(BROKE) and row["group"] == group}
    for case in import_module(GROUPS[group]).cases(stopwatch.device, dtype, settings.cpu, settings.all):
        began = time.perf_counter()
        if (group, case.name) in done:
            continue
        if began > deadline:
            rows.append({"group": group, "case": case.name, "arm": "-", "error": "out of time"})
            continue
        rows += measure(stopwatch, case, broke)
        print(f"{group}: {case.name}: {time.perf_counter() - began:.1f} s", flush=True)
        del case
        if stopwatch.on_gpu:
            torch.cuda.empty_cache()


def describe(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    about: dict[str, Any] = {"device": "processor", "dtype": str(dtype).removeprefix("torch."),
                             "python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            about[package] = version(package)
        except PackageNotFoundError:
            about[package] = "not installed"
    about["torch"], about["cuda"] = torch.__version__, torch.version.cuda
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about |= {"device": properties.name, "capability": f"{properties.major}.{properties.minor}",
                  "memory_gib": round(properties.total_memory / 2**30, 1), "l2_mib": properties.L2_cache_size / 2**20,
                  "processors": properties.multi_processor_count, "driver": _said(
                      "nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit",
                      "--format=csv,noheader")}
    plain = [f"{name} ({taken.why})" for name, needs in OPERATIONS.items()
             if not (taken := way(name, device, dtype if dtype in needs.dtypes else needs.dtypes[0])).triton]
    return about | {"without crumb's Triton kernels": ", ".join(plain) or "none",
                    "commit": _said("git", "-C", HERE, "rev-parse", "--short", "HEAD")}


def _said(*command: Any) -> str:
    try:
        asked = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return asked.stdout.strip() or "unknown"


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


if __name__ == "__main__":
    sys.exit(main())
