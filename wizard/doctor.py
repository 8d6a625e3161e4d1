"""`crumb doctor`: what this machine can do, each finding with what follows from it.

Heavy packages are tried in a process of their own, so that one that crashes on import is a finding, not an end.
"""

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from crumb.engine.run.directory import runs_folder
from crumb.profiles.hardware import Gpu, detect_gpu
from crumb.profiles.paths import cache_dir
from crumb.wizard import terminal

GIB = 2**30
MIN_FREE_GIB = 2
TURING = 7.5
SLOW_LINK_GB_PER_S = 8
"""Below PCIe 3.0 x16 and 4.0 x8, the least that cards are made for: a slot of fewer lanes, or of an old board."""

PROBE_TIMEOUT_S = 180

PACKAGES = {
    "torch": "nothing can be trained",
    "diffusers": "nothing can be trained",
    "transformers": "nothing can be trained",
    "triton": "plain torch does its work",
    "bitsandbytes": "nothing: crumb's 8-bit optimizers are its own",
    "prodigyopt": "a plan with Prodigy is refused; set optimizer to AdamW8bit or AdamW",
    "xformers": "nothing: it is optional, torch's own attention is used",
}
"""Packages that are tried, and what follows where one is missing."""

PROBE = """
import importlib, json, sys
for name in sys.argv[1:]:
    try:
        module = importlib.import_module(name)
        found = {"ok": True, "why": ""}
        if name == "torch":
            found["cuda"] = module.cuda.is_available()
    except BaseException as error:
        found = {"ok": False, "why": f"{type(error).__name__}: {error}"}
    print("\\n" + json.dumps({"name": name, **found}), flush=True)
"""


@dataclass(frozen=True)
class Finding:
    """`status`: ok, missing or broken; `consequence`: what follows, empty where all is well."""

    name: str
    status: str
    detail: str
    consequence: str = ""


def doctor(options) -> int:
    """`crumb doctor`; the exit code is 0 whatever is found."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    with Console(stderr=True).status("Trying what is installed ..."):
        findings = examine()
    if options.json:
        print(json.dumps({finding.name: asdict(finding) for finding in findings}, indent=1))
        return 0
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for finding in findings:
        style = {"ok": "green", "missing": "yellow", "broken": "red"}[finding.status]
        words = f"{finding.detail}. Consequence: {finding.consequence}" if finding.consequence else finding.detail
        table.add_row(finding.name, Text(finding.status, style=style), words)
    Console(highlight=False, markup=False).print(table)
    return 0


def examine() -> list[Finding]:
    gpu = detect_gpu()
    return [
        Finding("python", "ok", f"{platform.python_version()} at {sys.executable}"),
        Finding("system", "ok", f"{platform.platform()}, {os.cpu_count()} CPU cores"),
        _terminal(),
        _disk("cache", cache_dir()),
        _disk("runs", runs_folder()),
        _login_session(),
        _gpu(gpu),
        *([_gpu_speed(gpu)] if gpu else []),
        *_packages(gpu),
        _kernels(),
    ]


def _terminal() -> Finding:
    detail = f"{terminal.describe()}, {sys.stdout.encoding}"
    if not sys.stdout.isatty():
        return Finding("terminal", "ok", f"{detail}; the output is not a terminal here")
    reason = terminal.refusal()
    if reason:
        return Finding("terminal", "broken", detail, reason)
    columns, rows = shutil.get_terminal_size()
    if columns < terminal.MIN_SIZE[0] or rows < terminal.MIN_SIZE[1]:
        return Finding("terminal", "ok", detail, "smaller than 80x24, so the wizard must be scrolled")
    return Finding("terminal", "ok", detail)


def _disk(name: str, folder: Path) -> Finding:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free_gib = shutil.disk_usage(existing).free / GIB
    detail = f"{folder}: {free_gib:.1f} GiB free"
    if not os.access(existing, os.W_OK):
        return Finding(f"disk for {name}", "broken", f"{detail}, not writable", f"nothing can be kept below {existing}")
    if free_gib < MIN_FREE_GIB:
        return Finding(f"disk for {name}", "broken", detail, "caches and checkpoints may not fit; make room")
    return Finding(f"disk for {name}", "ok", detail)


def _login_session() -> Finding:
    """Whether logging out ends the person's processes (systemd's KillUserProcesses)."""
    files = [Path("/etc/systemd/logind.conf"), *sorted(Path("/etc/systemd/logind.conf.d").glob("*.conf"))]
    lines = [line.strip() for file in files if file.is_file() for line in file.read_text(errors="replace").splitlines()]
    if any(line.replace(" ", "").lower() == "killuserprocesses=yes" for line in lines):
        return Finding("logging out", "broken", "KillUserProcesses=yes in logind.conf",
                       "a run ends when you log out; allow it by `loginctl enable-linger`, or start crumb inside tmux")
    return Finding("logging out", "ok", "runs go on after the connection ends")


def _gpu(gpu: Gpu | None) -> Finding:
    if gpu is None:
        return Finding("gpu", "missing", "no NVIDIA card or driver answers",
                       "training runs on the processor, which is only practical for `crumb demo`")
    detail = f"{gpu.name}, {gpu.vram_gib:g} GiB, {gpu.free_gib or 0:.1f} free, compute capability {gpu.compute_capability}"
    consequences = ["no bf16 on this card, so training uses fp16"] if not gpu.has_bf16 else []
    if gpu.compute_capability < TURING:
        consequences.append("torch leaves this card out of its builds for CUDA 12.8 and later; take the one for CUDA 12.6")
    if "fp16_convolutions" in gpu.quirks:
        consequences.append("convolutions in fp16, which some GTX 16 cards compute wrongly, are tried before a run")
    return Finding("gpu", "ok", ". ".join([detail, *filter(None, [gpu.note.rstrip(".")])]), "; ".join(consequences))


def _gpu_speed(gpu: Gpu) -> Finding:
    """What the card should compute and move, by the table; nothing is measured here."""
    if not gpu.fp16_tflops:
        return Finding("gpu speed", "ok", "not known for this card")
    precision = "bf16 and fp16" if gpu.bf16_tflops else "fp16"
    detail = (f"{gpu.fp16_tflops:.1f} TFLOP/s in {precision}, {gpu.int8_tops:.1f} TOPS in int8 ({gpu.rates_from}); its memory "
              f"{gpu.bandwidth_gb_per_s:.0f} GB/s; PCIe {gpu.pcie_generation}.0 x{gpu.pcie_lanes}, about "
              f"{gpu.pcie_gb_per_s:.0f} GB/s")
    return Finding("gpu speed", "ok", detail, "" if gpu.pcie_gb_per_s >= SLOW_LINK_GB_PER_S else
                   "a base that does not fit the card would be streamed slowly; see whether it sits in the board's fast slot")


def _kernels() -> Finding:
    """Which of crumb's operations run by its own Triton kernels here; asked in a process that may load torch."""
    try:
        done = subprocess.run([sys.executable, "-P", "-m", "crumb.kernels.dispatch"], capture_output=True, text=True,
                              timeout=PROBE_TIMEOUT_S, stdin=subprocess.DEVNULL)
        ways = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError):
        return Finding("kernels", "broken", "they can't be loaded", "nothing can be trained; look at torch and triton above")
    names_by_reason: dict[str, list[str]] = {}
    for name, way in ways.items():
        names_by_reason.setdefault(("Triton" if way["triton"] else "plain torch") + f" ({way['why']})", []).append(name)
    return Finding("kernels", "ok", "; ".join(f"{reason}: {', '.join(names)}" for reason, names in names_by_reason.items()))


def _packages(gpu: Gpu | None) -> list[Finding]:
    probed = probe_packages(list(PACKAGES))
    return [_package(name, probed.get(name), gpu) for name in PACKAGES]


def probe_packages(names: list[str]) -> dict[str, dict]:
    """What importing each gives, tried one after the other in one other process; one that kills it has no entry."""
    try:
        done = subprocess.run([sys.executable, "-P", "-c", PROBE, *names], capture_output=True, text=True,
                              timeout=PROBE_TIMEOUT_S, stdin=subprocess.DEVNULL)
        output = done.stdout
    except subprocess.TimeoutExpired as error:
        output = (error.stdout or b"").decode(errors="replace")
    found = {}
    for line in output.splitlines():
        if line.startswith('{"name"'):
            result = json.loads(line)
            found[result["name"]] = result
    return found


def _package(name: str, probed: dict | None, gpu: Gpu | None) -> Finding:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "missing", "not installed", PACKAGES[name])
    if probed is None:
        return Finding(name, "broken", f"{version}: importing it ended or hung the process", PACKAGES[name])
    if not probed["ok"]:
        why = probed["why"].splitlines()[0] if probed["why"] else "no reason given"
        return Finding(name, "broken", f"{version}: {why}", PACKAGES[name])
    if name == "torch" and gpu and not probed["cuda"]:
        return Finding(name, "broken", f"{version} does not see the GPU",
                       "training runs on the processor; install a CUDA build of torch that fits the driver")
    cuda = " with CUDA" if probed.get("cuda") else " without CUDA" if name == "torch" else ""
    return Finding(name, "ok", f"{version}{cuda}")
