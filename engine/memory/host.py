"""Memory of the host for what a GPU reads: how much there is, and buffers that it copies from by itself."""

import ctypes
import logging
import mmap
import sys
import weakref
from contextlib import suppress

import torch
from torch import Tensor

from crumb.profiles.errors import RequestError
from crumb.profiles.hardware import GIB, host_memory_bytes

log = logging.getLogger(__name__)


def require_memory(num_bytes: int, purpose: str) -> None:
    """RequestError where the host has less than this to give. `purpose` begins the sentence that says so."""
    available = host_memory_bytes()
    if available is not None and available < num_bytes:
        raise RequestError(
            f"{purpose} takes {num_bytes / GIB:.1f} GiB of this machine's memory, of which {available / GIB:.1f} GiB are free. "
            f"Close other programs, or set quantize_base = \"int8\" or \"nf4\" in the plan, which take less.")


def host_buffer(num_bytes: int, locked: bool) -> Tensor:
    """uint8 (num_bytes,), page-locked where asked for and where the system lets it, as long as this very tensor is held.

    torch's own page-locked memory comes in powers of two, up to twice of what is asked for; this is pages, exactly.
    """
    pages = mmap.mmap(-1, max(num_bytes, 1))
    buffer = torch.frombuffer(pages, dtype=torch.uint8)[:num_bytes]
    if locked and num_bytes and _lock(buffer):
        # Pages that vanish while they count as locked would make the next ones at their address fail.
        weakref.finalize(buffer, _unlock, buffer.data_ptr(), pages).atexit = False
    return buffer


def give_back_freed() -> None:
    """Has the C library return what was freed to the system: from among what is in use it never does by itself."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        if trim:
            trim(0)


def _lock(buffer: Tensor) -> bool:
    error = int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), len(buffer), 1))  # 1: for every device
    if error:
        log.warning("%d bytes of host memory can't be page-locked (CUDA error %d): copies from there are slower and hold up "
                    "the host", len(buffer), error)
        with suppress(RuntimeError):
            torch.ones((), device="cuda")  # the error would otherwise be reported by whatever is launched next
    return error == 0


def _unlock(address: int, _pages: mmap.mmap) -> None:
    torch.cuda.synchronize()  # a copy may be under way
    torch.cuda.cudart().cudaHostUnregister(address)
