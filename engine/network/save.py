"""Writes the LoRA file: kohya's key names and metadata, which every program reads.

The file is written by our own few lines, since the safetensors library writes metadata in an order that
changes from process to process, and the same plan must give the same file, bit for bit.
"""

import hashlib
import json
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from crumb.engine.network.lora import LoRALayer, Network
from crumb.engine.run.directory import write_atomic

SAVE_DTYPES = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_TAGS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64", torch.int64: "I64",
         torch.int32: "I32", torch.int16: "I16", torch.uint8: "U8", torch.int8: "I8", torch.bool: "BOOL"}


def lora_tensors(network: Network, dtype: torch.dtype) -> dict[str, Tensor]:
    """The file's tensors on the CPU: STEM.lora_down.weight, STEM.lora_up.weight and a 0-dim STEM.alpha each.

    diffusers misreads a file whose alphas differ among modules of one kind, so each kind is written with its commonest
    alpha and what differs goes into lora_up.
    """
    alphas = {kind: Counter(layer.alpha for stem, layer in network.layers.items() if _kind(stem, layer) == kind)
              for kind in {_kind(stem, layer) for stem, layer in network.layers.items()}}
    tensors = {}
    for stem, layer in network.layers.items():
        alpha = max(alphas[_kind(stem, layer)].items(), key=lambda item: (item[1], -item[0]))[0]
        up = layer.lora_B.detach() if layer.alpha == alpha else layer.lora_B.detach() * (layer.alpha / alpha)
        tensors[f"{stem}.alpha"] = torch.tensor(alpha, dtype=dtype)
        tensors[f"{stem}.lora_down.weight"] = layer.lora_A.detach().to("cpu", dtype)
        tensors[f"{stem}.lora_up.weight"] = up.to("cpu", dtype)
    return tensors


def _kind(stem: str, layer: LoRALayer) -> tuple[str, bool]:
    """Modules that must share an alpha: those of one model, 3x3 convolutions apart."""
    return stem[:8], layer.lora_A.dim() == 4 and layer.lora_A.shape[2:] != (1, 1)


def save_lora(path: Path, network: Network, save_precision: str, metadata: dict[str, str]) -> None:
    """Writes the LoRA file whole or not at all. `metadata` gains the hash A1111 shows (sshs_model_hash)."""
    encode_to = lora_tensors(network, SAVE_DTYPES[save_precision])
    write_safetensors(path, encode_to, metadata, with_hash=True)


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], with_hash: bool = False) -> None:
    """A .safetensors file in a fixed order: the same tensors and metadata give the same bytes."""
    entries, blocks, offset = {}, [], 0
    # Widest elements first keeps every tensor aligned to its element size.
    for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):
        tensor = tensors[name].detach().cpu().contiguous()
        block = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        entries[name] = {"dtype": _TAGS[tensor.dtype], "shape": list(tensor.shape),
                         "data_offsets": [offset, offset + len(block)]}
        offset += len(block)
        blocks.append(block)
    body = b"".join(blocks)
    if with_hash:
        metadata = {**metadata, "sshs_model_hash": hashlib.sha256(body).hexdigest()}
    header = json.dumps({"__metadata__": dict(sorted(metadata.items())), **entries}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    write_atomic(path, len(header).to_bytes(8, "little") + header + body)
