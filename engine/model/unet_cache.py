"""The quantised U-Net kept on disk, so that a base is quantised once.

An entry is one safetensors file. It is written tensor by tensor while the U-Net is loaded, since a card's weights need not
fit in the host's memory: room for the header is left free and filled at the end. Its name says what it was made of, so it
is never stale; it has checksums, because machines that lose power leave torn files behind. Reading checks them on the way,
so a damaged entry is known only when most of it is in place: the caller then begins again from the base.

Nothing that the disk refuses stops a run: the entry is given up, with a warning.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from crumb.engine.model.weights import DTYPES, OnProgress, as_bytes, data_start, place, read_tensor
from crumb.engine.run.directory import fsync_folder
from crumb.kernels.quantize import Int8Weight, NF4Weight
from crumb.profiles.errors import RequestError
from crumb.profiles.paths import cache_dir
from crumb.profiles.safetensors_header import read_header

log = logging.getLogger("crumb")

ENTRY_FORMAT = 1
"""Part of every entry's name: raise it when quantising gives other values, or when entries are laid out differently."""

MIN_FREE_BYTES = 2 * 2**30
"""What an entry leaves free on its disk: checkpoints and the person's own work come first."""

HEADER_BYTES = 3 * 128
"""Room in the header for the parts of one tensor, without its name: three at most."""
ALIGNMENT = 4096

Value = nn.Parameter | Int8Weight | NF4Weight
Add = Callable[[str, Value], None]
"""Given the name and the value of the next tensor."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One U-Net in one format; weights are rounded to `dtype` before they are quantised, and the others stay in it."""

    base_sha256: str
    quantise: str
    dtype: torch.dtype

    @property
    def path(self) -> Path:
        return cache_dir() / "unets" / f"{self.base_sha256}-{self.quantise}-{NAMES[self.dtype]}-{ENTRY_FORMAT}.safetensors"

    @property
    def made_of(self) -> dict[str, str]:
        return {"base": self.base_sha256, "quantise": self.quantise, "dtype": NAMES[self.dtype], "format": str(ENTRY_FORMAT)}


def read_unet(unet: nn.Module, entry: Entry, home: Callable[[str], torch.device], on_progress: OnProgress | None,
              warn: Callable[[str], None]) -> bool:
    """Gives a U-Net made on the meta device the entry's weights, each on the device that `home` says for its name.

    False where there is no entry, or, with a warning, where it is damaged: then the U-Net is spoiled.
    """
    if not entry.path.exists():
        return False
    try:
        _read(unet, entry, home, on_progress)
        return True
    except (ValueError, RequestError) as error:
        warn(f"The quantised base that was kept in {entry.path} is damaged ({error}): it is made again.")
        return False


def _read(unet: nn.Module, entry: Entry, home: Callable[[str], torch.device], on_progress: OnProgress | None) -> None:
    header, metadata = read_header(entry.path)
    if {name: metadata.get(name) for name in entry.made_of} != entry.made_of or metadata.get("layout") != _layout(header):
        raise ValueError("its header is not one that crumb wrote for it")
    parameters = dict(unet.named_parameters())
    if {key.partition(":")[0] for key in header} != parameters.keys():
        raise ValueError("it holds other tensors than this U-Net has")
    start, digest = data_start(entry.path), hashlib.sha256()
    in_file_order = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    total_bytes = in_file_order[-1][1]["data_offsets"][1]
    with entry.path.open("rb") as file:
        for name, parts in groupby(in_file_order, key=lambda item: item[0].partition(":")[0]):
            found = {}
            for key, info in parts:
                tensor = read_tensor(file, start + info["data_offsets"][0], info["shape"], info["dtype"])
                digest.update(as_bytes(tensor))
                found[key.partition(":")[2]] = tensor.to(home(name))
            place(unet, name, _joined(found, parameters[name].shape))
            if on_progress:
                on_progress(info["data_offsets"][1], total_bytes)
    if digest.hexdigest() != metadata.get("values"):
        raise ValueError("its checksum is wrong")


@contextmanager
def writing(entry: Entry, unet: nn.Module, num_bytes: int, warn: Callable[[str], None]) -> Iterator[Add]:
    """Gives the function that adds a tensor to the new entry, which replaces what is there when the block ends well.

    `unet` is any with the tensors' names; `num_bytes` is about what the entry will take. Where another process writes this
    very entry, or the disk is too full, nothing is written.
    """
    writer = None

    def attempt(work: Callable[[], _Writer | None]) -> _Writer | None:
        """The writer as it is after the work; None where there is nothing to write to any more."""
        try:
            return work()
        except OSError as error:
            warn(f"The quantised base is not kept for the next start, which will quantise it again: "
                 f"{error.strerror or error} ({entry.path.parent}). Free some space there, or point CRUMB_CACHE to another "
                 f"disk.")
            if writer:
                writer.close()
            return None

    def add(name: str, value: Value) -> None:
        nonlocal writer
        writer = writer and attempt(lambda: writer.add(name, value))

    writer = attempt(lambda: _start(entry, [name for name, _ in unet.named_parameters()], num_bytes))
    try:
        yield add
        writer = writer and attempt(writer.finish)
    finally:
        if writer:
            writer.close()


class _Writer:
    """One entry while it is written aside. The lock on the file is the process's claim to write it."""

    def __init__(self, entry: Entry, aside: Path, file: BinaryIO, header_bytes: int):
        self.entry, self.aside, self.file, self.header_bytes = entry, aside, file, header_bytes
        self.header: dict[str, dict] = {}
        self.digest, self.end, self.is_finished = hashlib.sha256(), 0, False
        file.truncate(0)  # of a process that was killed
        file.seek(8 + header_bytes)

    def add(self, name: str, value: Value) -> "_Writer":
        for part, tensor in _split(value).items():
            _require_room(self.aside.parent, tensor.nbytes)
            data = as_bytes(tensor.detach().cpu())
            self.file.write(data)
            self.digest.update(data)
            self.header[f"{name}:{part}"] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape),
                                             "data_offsets": [self.end, self.end + len(data)]}
            self.end += len(data)
        return self

    def finish(self) -> "_Writer":
        metadata = self.entry.made_of | {"layout": _layout(self.header), "values": self.digest.hexdigest()}
        encoded = json.dumps({"__metadata__": metadata, **self.header}, separators=(",", ":")).encode()
        if len(encoded) > self.header_bytes:
            raise AssertionError(f"a header of {len(encoded)} bytes where {self.header_bytes} were left free")
        self.file.seek(0)
        self.file.write(self.header_bytes.to_bytes(8, "little") + encoded.ljust(self.header_bytes))
        self.file.flush()
        os.fsync(self.file.fileno())
        os.replace(self.aside, self.entry.path)
        self.is_finished = True
        fsync_folder(self.entry.path.parent)
        return self

    def close(self) -> None:
        """Leaves nothing aside."""
        if not self.is_finished:
            self.aside.unlink(missing_ok=True)
        with suppress(OSError):  # what a full disk did not take is not wanted any more
            self.file.close()


def _start(entry: Entry, names: list[str], num_bytes: int) -> _Writer | None:
    """None where another process is at it."""
    folder = entry.path.parent
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _require_room(folder, num_bytes)
    aside = folder / f".{entry.path.name}.part"
    file = os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT, 0o600), "wb")
    if not _claim(file, aside):
        file.close()
        log.info("another process is writing %s", entry.path)
        return None
    room = 1024 + sum(HEADER_BYTES + 3 * len(name) for name in names)
    return _Writer(entry, aside, file, room - (room + 8) % ALIGNMENT + ALIGNMENT)


def _claim(file: BinaryIO, aside: Path) -> bool:
    """Whether this process alone may write the file that it has opened as `aside`."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    # Otherwise the other one has just finished, and the file has its real name now.
    return aside.exists() and aside.stat().st_ino == os.fstat(file.fileno()).st_ino


def _require_room(folder: Path, num_bytes: int) -> None:
    if shutil.disk_usage(folder).free - num_bytes < MIN_FREE_BYTES:
        raise OSError(errno.ENOSPC, f"less than {MIN_FREE_BYTES / 2**30:.0f} GiB of the disk would stay free")


def _split(value: Value) -> dict[str, Tensor]:
    """Contiguous tensors by the names of their fields; a convolution's in the order of its memory, channels last."""
    if isinstance(value, NF4Weight):
        return {"codes": value.codes, "block_codes": value.block_codes, "group_ranges": value.group_ranges}
    if isinstance(value, Int8Weight):
        return {"values": _last(value.values), "scales": value.scales}
    return {"exact": _last(value.detach())}


def _joined(parts: dict[str, Tensor], shape: torch.Size) -> Value:
    """The inverse of `_split`."""
    if "codes" in parts:
        return NF4Weight(**parts, shape=shape)
    if "values" in parts:
        return Int8Weight(_first(parts["values"]), parts["scales"])
    return nn.Parameter(_first(parts["exact"]), requires_grad=False)


def _last(tensor: Tensor) -> Tensor:
    return tensor.permute(0, 2, 3, 1) if tensor.dim() == 4 else tensor


def _first(tensor: Tensor) -> Tensor:
    return tensor.permute(0, 3, 1, 2) if tensor.dim() == 4 else tensor


def _layout(header: dict[str, dict]) -> str:
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()
