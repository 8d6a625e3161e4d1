"""The demo's packaged base, written out as the SDXL file that every trainer reads.

Packaged it is a third smaller: its token embeddings hold only the rows in use, and `token_rows` says which of them
each of CLIP's 49,408 tokens takes. Free of torch, since the command line does this before any engine starts.
"""

import hashlib
import json
from importlib.resources import files
from pathlib import Path

import numpy as np

from crumb.engine.run.directory import write_atomic
from crumb.profiles.safetensors_header import read_header

DEMO_FOLDER = "demo"
TOKEN_EMBEDDINGS = "token_embedding.weight"


def demo_folder(name: str) -> Path:
    """A packaged picture set: "style" or "character"."""
    return Path(str(files("crumb.engine") / DEMO_FOLDER / name))


def write_demo_base(folder: Path) -> Path:
    """The full file in `folder`, written where it is missing; its name carries the packaged file's hash."""
    packaged = Path(str(files("crumb.engine") / DEMO_FOLDER / "base.safetensors"))
    content = packaged.read_bytes()
    path = folder / f"demo-base-{hashlib.sha256(content).hexdigest()[:12]}.safetensors"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, expanded(content, *read_header(packaged)))
    return path


def expanded(content: bytes, tensors: dict[str, dict], metadata: dict[str, str]) -> bytes:
    """The file with one row per token in each token embedding, and without `token_rows`."""
    body = memoryview(content)[8 + int.from_bytes(content[:8], "little") :]
    parts = {name: body[slice(*info["data_offsets"])] for name, info in tensors.items()}
    rows = np.frombuffer(parts.pop("token_rows"), "<i4")
    entries, blocks, offset = {}, [], 0
    for name, block in parts.items():
        shape = tensors[name]["shape"]
        if name.endswith(TOKEN_EMBEDDINGS):
            block = np.frombuffer(block, "<u2").reshape(shape)[rows].tobytes()
            shape = [len(rows), shape[1]]
        entries[name] = {"dtype": tensors[name]["dtype"], "shape": shape, "data_offsets": [offset, offset + len(block)]}
        offset += len(block)
        blocks.append(block)
    header = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return b"".join([len(header).to_bytes(8, "little"), header, *blocks])
