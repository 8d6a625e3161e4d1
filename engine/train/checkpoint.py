"""Checkpoints: all that a resumed run needs to end in the same file as one that was never stopped.

A folder checkpoints/step-000500 is written aside, fsynced and renamed: it is there whole, or not at all.

    NAME-step-000500.safetensors   the LoRA as it stands, ready to use
    state.safetensors              fp32 LoRA weights and the optimizer's tensors
    state.json                     step, loss scale, the optimizer's plain numbers, what plan and base it belongs to

Noise and data order are functions of seed and step, so there is no generator state. No pickle anywhere.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.optim import Optimizer

from crumb.engine.network.lora import Network
from crumb.engine.network.save import save_lora, write_safetensors
from crumb.engine.run.directory import RunDirectory, fsync_folder, write_atomic


def checkpoint_name(step: int) -> str:
    return f"step-{step:06d}"


def save_checkpoint(run: RunDirectory, step: int, network: Network, optimizer: Optimizer, scaler: torch.amp.GradScaler,
                    belongs_to: dict[str, str], loss_smoothed: float | None, save_precision: str,
                    metadata: dict[str, str]) -> Path:
    """Writes the checkpoint of a finished step and returns its folder. `belongs_to` names plan and base by hash."""
    folder = run.checkpoints / checkpoint_name(step)
    aside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(mode=0o700)
    save_lora(aside / f"{run.name}-{folder.name}.safetensors", network, save_precision, metadata)

    optimizer_tensors, optimizer_numbers = pack_optimizer(optimizer)
    weights = {f"{stem}.{name}": getattr(layer, name).detach()
               for stem, layer in network.layers.items() for name in ("lora_A", "lora_B")}
    write_safetensors(aside / "state.safetensors", weights | optimizer_tensors, {})
    state = {"step": step, "scaler": scaler.state_dict(), "optimizer": optimizer_numbers, "belongs_to": belongs_to,
             "loss_smoothed": loss_smoothed,
             "sha256": hashlib.sha256((aside / "state.safetensors").read_bytes()).hexdigest()}
    write_atomic(aside / "state.json", json.dumps(state).encode())

    shutil.rmtree(folder, ignore_errors=True)
    os.replace(aside, folder)
    fsync_folder(run.checkpoints)
    return folder


def load_checkpoint(run: RunDirectory, belongs_to: dict[str, str], warn: Callable[[str], None],
                    refuse: Callable[[str], Exception]) -> tuple[dict, dict[str, Tensor]] | None:
    """State and tensors of the newest whole checkpoint, or None. A damaged one is passed over, with a warning.

    `refuse` makes the error for a checkpoint of another plan or base.
    """
    for folder in sorted(run.checkpoints.glob("step-*"), reverse=True):
        try:
            state = json.loads((folder / "state.json").read_bytes())
            data = (folder / "state.safetensors").read_bytes()
            if hashlib.sha256(data).hexdigest() != state["sha256"]:
                raise ValueError("its checksum is wrong")
            tensors = load_file(folder / "state.safetensors")
        except (OSError, ValueError, KeyError) as error:
            warn(f"Checkpoint {folder.name} is damaged ({error}); going back to the one before it.")
            continue
        for name, value in belongs_to.items():
            if state["belongs_to"].get(name) != value:
                raise refuse(name)
        return state, tensors
    return None


def restore(state: dict, tensors: dict[str, Tensor], network: Network, optimizer: Optimizer,
            scaler: torch.amp.GradScaler) -> None:
    """Puts a checkpoint back, in place."""
    with torch.no_grad():
        for stem, layer in network.layers.items():
            layer.lora_A.copy_(tensors[f"{stem}.lora_A"])
            layer.lora_B.copy_(tensors[f"{stem}.lora_B"])
    unpack_optimizer(optimizer, tensors, state["optimizer"])
    scaler.load_state_dict(state["scaler"])


def prune_checkpoints(run: RunDirectory, keep: int) -> None:
    """Deletes all but the newest `keep`, and what a killed engine left half written."""
    for leftover in run.checkpoints.glob(".step-*.part"):
        shutil.rmtree(leftover, ignore_errors=True)
    for folder in sorted(run.checkpoints.glob("step-*"))[:-keep]:
        shutil.rmtree(folder, ignore_errors=True)


def pack_optimizer(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as tensors and as JSON values; works for any that keeps to torch's state_dict."""
    content = optimizer.state_dict()
    tensors, numbers = {}, {"state": {}, "groups": []}
    for index, entries in content["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{name}"] = value
            else:
                numbers["state"].setdefault(str(index), {})[name] = value
    for position, group in enumerate(content["param_groups"]):
        plain = {}
        for name, value in group.items():
            if isinstance(value, Tensor):
                tensors[f"group.{position}.{name}"] = value
            elif name != "params":
                plain[name] = value
        numbers["groups"].append(plain)
    return tensors, numbers


def unpack_optimizer(optimizer: Optimizer, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    """The inverse of `pack_optimizer`, in place."""
    state = {int(index): dict(entries) for index, entries in numbers["state"].items()}
    groups = optimizer.state_dict()["param_groups"]
    for group, saved in zip(groups, numbers["groups"]):
        group.update({name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()})
    for key, value in tensors.items():
        kind, _, rest = key.partition(".")
        index, _, name = rest.partition(".")
        if kind == "optimizer":
            state.setdefault(int(index), {})[name] = value
        elif kind == "group":
            groups[int(index)][name] = value
    optimizer.load_state_dict({"state": state, "param_groups": groups})
