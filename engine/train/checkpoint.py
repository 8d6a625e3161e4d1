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


def lora_in_checkpoint(run: RunDirectory, step: int) -> Path:
    """The LoRA file of a checkpoint."""
    name = checkpoint_name(step)
    return run.checkpoints / name / f"{run.name}-{name}.safetensors"


def save_checkpoint(run: RunDirectory, step: int, network: Network, optimizer: Optimizer, scaler: torch.amp.GradScaler,
                    belongs_to: dict[str, str], progress: dict[str, Any], save_precision: str,
                    metadata: dict[str, str]) -> Path:
    """Writes the checkpoint of a finished step and returns its folder.

    `belongs_to` names plan and base by hash; `progress` is what else a resumed run goes on with, as JSON.
    """
    folder = run.checkpoints / checkpoint_name(step)
    aside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(mode=0o700)
    try:
        save_lora(aside / lora_in_checkpoint(run, step).name, network, save_precision, metadata)
        optimizer_tensors, optimizer_numbers = pack_optimizer(optimizer)
        weights = {f"{stem}.{name}": getattr(layer, name).detach()
                   for stem, layer in network.layers.items() for name in ("lora_A", "lora_B")}
        write_safetensors(aside / "state.safetensors", weights | optimizer_tensors, {})
        state = {"step": step, "scaler": scaler.state_dict(), "optimizer": optimizer_numbers, "belongs_to": belongs_to,
                 "progress": progress, "sha256": hashlib.sha256((aside / "state.safetensors").read_bytes()).hexdigest()}
        write_atomic(aside / "state.json", json.dumps(state).encode())
    except OSError:
        shutil.rmtree(aside, ignore_errors=True)  # half a checkpoint would keep a full disk full
        raise
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


def prune_checkpoints(run: RunDirectory, keep: int, best_step: int | None = None) -> None:
    """Deletes all but the newest `keep` and the best, and what a killed engine left half written."""
    for leftover in run.checkpoints.glob(".step-*.part"):
        shutil.rmtree(leftover, ignore_errors=True)
    for folder in sorted(run.checkpoints.glob("step-*"))[:-keep]:
        if best_step is None or folder.name != checkpoint_name(best_step):
            shutil.rmtree(folder, ignore_errors=True)


def pack_optimizer(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state_dict as tensors and as JSON, for any optimizer that keeps to torch's form.

    Tensors are named by their path, such as "state/3/exp_avg"; bitsandbytes puts dicts inside dicts.
    """
    content = optimizer.state_dict()
    groups = [{name: value for name, value in group.items() if name != "params"} for group in content["param_groups"]]
    tensors: dict[str, Tensor] = {}
    plain = _split({"state": content["state"], "groups": dict(enumerate(groups))}, "", tensors)
    return tensors, plain


def unpack_optimizer(optimizer: Optimizer, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
    """The inverse of `pack_optimizer`, in place."""
    merged = json.loads(json.dumps(plain))
    for path, tensor in tensors.items():
        *parents, name = path.split("/")
        if parents and parents[0] in ("state", "groups"):
            place = merged
            for parent in parents:
                place = place.setdefault(parent, {})
            place[name] = tensor
    content = optimizer.state_dict()
    for index, group in enumerate(content["param_groups"]):
        device = optimizer.param_groups[index]["params"][0].device
        for name, value in merged["groups"][str(index)].items():
            # torch moves the state to its parameters' device, but not what an optimizer keeps in its groups.
            group[name] = tuple(value) if isinstance(value, list) else value.to(device) if isinstance(value, Tensor) else value
    state = {int(index): entries for index, entries in merged["state"].items()}
    optimizer.load_state_dict({"state": state, "param_groups": content["param_groups"]})


def _split(content: dict, path: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What of a nested dict is no tensor; the tensors go into `tensors` under their path."""
    plain = {}
    for name, value in content.items():
        if isinstance(value, Tensor):
            tensors[f"{path}{name}"] = value
        elif isinstance(value, dict):
            plain[str(name)] = _split(value, f"{path}{name}/", tensors)
        else:
            plain[str(name)] = value
    return plain
