"""The host's memory: refused kindly where there is too little, and not taken twice while blocks are packed."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from crumb.engine.memory import host
from crumb.engine.memory.stream import stream_blocks
from crumb.profiles import hardware
from crumb.profiles.errors import RequestError

PACKS_AND_MEASURES = """
import sys, torch
from torch import nn
from crumb.engine.memory.stream import stream_blocks

def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) / 1024

blocks = {}
for number in range(40):  # as a base that is quantised on its way comes: what is freed lies between what is held
    layers = []
    for _ in range(8):
        passing = torch.ones(2**19)
        layers.append(nn.Linear(1024, 1024, bias=False, dtype=torch.float16).requires_grad_(False))
        del passing
    blocks[str(number)] = nn.Sequential(*layers)
del layers
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
ring = stream_blocks(blocks, torch.device("cpu"), 2)
packed = sum(len(block.host) for block in ring.blocks) / 2**20
print(packed, status("VmHWM") - before, status("VmRSS") - before)
"""


def test_too_little_memory_is_refused_before_anything_is_packed(tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "MEMORY_INFO", tmp_path / "meminfo")
    block = nn.Linear(64, 64).requires_grad_(False)
    weight = block.weight.data_ptr()
    (tmp_path / "meminfo").write_text("MemTotal:       99999999 kB\nMemAvailable:          8 kB\n")
    with pytest.raises(RequestError, match=r"Streaming 1 blocks of the base takes .* GiB of this machine's memory, of which"):
        stream_blocks({"a": block}, torch.device("cpu"))
    assert block.weight.data_ptr() == weight and "forward" not in vars(block)
    for text in ("MemTotal:       99999999 kB\nMemAvailable:       64 kB\n", "MemTotal: 1 kB\n"):
        (tmp_path / "meminfo").write_text(text)
        host.require_memory(2**15, "It")
    (tmp_path / "meminfo").unlink()
    host.require_memory(2**60, "It")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_packing_never_takes_much_more_than_what_is_packed():
    done = subprocess.run([sys.executable, "-P", "-c", PACKS_AND_MEASURES], capture_output=True, text=True, check=True)
    packed, peak, after = map(float, done.stdout.split())
    assert packed > 600 and peak < 80 and after < 80, done.stdout


def test_buffers_hold_what_they_are_given():
    for size in (0, 1, 5000):
        buffer = host.host_buffer(size, locked=False)
        assert buffer.shape == (size,) and buffer.dtype == torch.uint8
        assert (buffer.fill_(7) == 7).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_pages_are_locked_and_let_go_of():
    for _ in range(3):
        buffer = host.host_buffer(1 << 20, locked=True)
        assert buffer.is_pinned()
        assert not host._lock(buffer), "locked a second time"  # and what was launched next doesn't hear of it
        assert torch.ones(3, device="cuda").sum().item() == 3
        copied = torch.empty_like(buffer, device="cuda")
        copied.copy_(buffer.fill_(5), non_blocking=True)
        assert (copied == 5).all()
        del buffer
