"""Reads and checks the header of a .safetensors file, without the tensors and without torch.

Separate because base models and LoRA files are judged by the same header, before anything is loaded.
"""

import json
import math
from pathlib import Path

from crumb.profiles.errors import RequestError

MAX_HEADER_BYTES = 100 * 1024**2
PICKLE_SUFFIXES = {".ckpt", ".pt", ".pth", ".bin", ".pkl"}
ELEMENT_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
FOREIGN_STARTS = {
    b"version https://git-lfs": "a Git LFS pointer: the large file itself was not fetched (run `git lfs pull`)",
    b"<!DOCTYPE": "a web page: the download link led to a page, not to the file",
    b"<html": "a web page: the download link led to a page, not to the file",
    b"GGUF": "a GGUF file, quantised for inference; training needs the .safetensors version",
}


def read_header(path: Path | str) -> tuple[dict[str, dict], dict[str, str]]:
    """The tensors (`{name: {"dtype", "shape", "data_offsets"}}`) and the metadata of a file.

    Raises RequestError for a missing, truncated, pickled or foreign file.
    """
    path = Path(path)
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise RequestError(pickle_reason(path))
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            header_bytes = int.from_bytes(start, "little")
            _check_start(path, start + file.read(32), file_bytes, header_bytes)
            file.seek(8)
            raw = file.read(header_bytes)
    except FileNotFoundError:
        raise RequestError(f"{path} does not exist: check the path.") from None
    except OSError as error:
        raise RequestError(f"{path} cannot be read ({error.strerror}): check its permissions and the disk.") from None
    tensors, metadata = _parse(path, raw)
    promised = 8 + header_bytes + max((info["data_offsets"][1] for info in tensors.values()), default=0)
    if promised > file_bytes:
        raise RequestError(_truncated(path, file_bytes, promised))
    return tensors, metadata


def num_elements(info: dict) -> int:
    return math.prod(info["shape"])


def pickle_reason(path: Path) -> str:
    return (
        f"{path} is a pickled checkpoint, and opening a pickle can run any code hidden in it, so it is refused. "
        "Take the .safetensors version from where the model was published, or convert it on a machine without "
        "anything of value."
    )


def _check_start(path: Path, start: bytes, file_bytes: int, header_bytes: int) -> None:
    # A sound file may begin with the same two bytes as a pickle, as the low bytes of a small header length.
    is_pickle = start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05" and header_bytes > MAX_HEADER_BYTES
    if is_pickle or start[:4] == b"PK\x03\x04":
        raise RequestError(pickle_reason(path))
    for foreign, what in FOREIGN_STARTS.items():
        if start.lower().startswith(foreign.lower()):
            raise RequestError(f"{path} is not a .safetensors file: it is {what}.")
    if file_bytes < 8 or (header_bytes <= MAX_HEADER_BYTES and 8 + header_bytes > file_bytes):
        raise RequestError(_truncated(path, file_bytes, 8 + header_bytes if file_bytes >= 8 else 8))
    if header_bytes > MAX_HEADER_BYTES:
        raise RequestError(
            f"{path} is not a .safetensors file: its first 8 bytes promise a header of {header_bytes:,} bytes, "
            f"and at most {MAX_HEADER_BYTES:,} are allowed. Download it again, or choose another file."
        )


def _parse(path: Path, raw: bytes) -> tuple[dict[str, dict], dict[str, str]]:
    try:
        header = json.loads(raw)
        metadata = header.pop("__metadata__", None) or {}
        for name, info in header.items():
            _check_extent(name, info)
        return header, {str(key): str(value) for key, value in metadata.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise RequestError(
            f"{path} is not a sound .safetensors file: its header cannot be read ({str(error)[:120]}). "
            "Download it again, or choose another file."
        ) from None


def _check_extent(name: str, info: dict) -> None:
    begin, end = info["data_offsets"]
    if not all(isinstance(number, int) and number >= 0 for number in (begin, end, *info["shape"])):
        raise ValueError(f"tensor {name} has an impossible shape or place")
    element_bytes = ELEMENT_BYTES.get(info["dtype"])
    if end < begin or (element_bytes and end - begin != num_elements(info) * element_bytes):
        raise ValueError(f"tensor {name} has the wrong extent")


def _truncated(path: Path, file_bytes: int, promised: int) -> str:
    return (
        f"{path} is truncated: it has {file_bytes:,} bytes and its header promises {promised:,}. "
        "This is usually an interrupted download: fetch it again."
    )
