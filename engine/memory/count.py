"""What a training step holds in memory, block by block, counted on tensors that have shapes but no values.

Nothing is computed, so this runs on any machine in seconds: torch's fake tensors go through the real blocks, the real
autograd graph and the real LoRA layers, while every storage is counted from its making to its end. Weights, LoRA and its
gradients are left out; profiles/vram.py adds them. What a GPU's libraries take inside one operation is not seen here.

    python -P -m crumb.engine.memory.count FILE      writes SDXL's table (profiles/sdxl_memory.json) anew: some minutes
"""

import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field
from importlib.metadata import version
from pathlib import Path
from unittest.mock import patch

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from crumb.engine.memory.recompute import placeable_blocks, recompute_blocks
from crumb.engine.model.frozen import IN_BLOCKS, freeze_layers
from crumb.engine.model.lean import make_lean
from crumb.engine.model.tiny import SDXL, unet_config
from crumb.engine.network import lora
from crumb.engine.network.lora import attach_lora
from crumb.kernels import linear, lora_linear
from crumb.profiles.memory_table import MODES, Span, Table, Weights, dump_tables, fit_span
from crumb.profiles.plan import TARGETS, Plan

NUM_TEXT_TOKENS = 77
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
"""They keep what the GPU's flash and memory-efficient attention keep: q, k, v, the result, a logarithm per query."""


@dataclass
class Step:
    """What was counted of one step: spans by block, in the order in which they begin."""

    forward: dict[str, Span] = field(default_factory=dict)
    backward: dict[str, Span] = field(default_factory=dict)
    peak_bytes: int = 0


class Counter(TorchDispatchMode):
    """Counts the bytes of all storages made under it and not yet let go of, and floating-point operations."""

    def __init__(self, left_out: list[Tensor]):
        super().__init__()
        self.live = self.peak = self.highest = 0
        self.flops = self.attention_flops = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in left_out}
        self._start = (0, 0, 0)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        operation = function._overloadpacket
        if operation in (ATTENTION, ATTENTION_BACKWARD):
            query, key = args[:2] if operation is ATTENTION else args[1:3]
            # Two products, and five of the same size in backward, which computes the first of them again.
            self.attention_flops += (4 if operation is ATTENTION else 10) * query.numel() * key.shape[-2]
        elif operation in flop_registry:
            self.flops += flop_registry[operation](*args, **kwargs, out_val=result)
        return result

    def cut(self) -> Span:
        """What happened since the last cut."""
        live, flops, attention_flops = self._start
        span = Span(self.live - live, self.peak - live, self.flops - flops, self.attention_flops - attention_flops)
        self._start, self.peak = (self.live, self.flops, self.attention_flops), self.live
        return span

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.known:
            self.known.add(key)
            num_bytes = storage.nbytes()
            self.live += num_bytes
            self.peak, self.highest = max(self.peak, self.live), max(self.highest, self.live)
            weakref.finalize(storage, self._forget, key, num_bytes)

    def _forget(self, key: int, num_bytes: int) -> None:
        self.known.discard(key)
        self.live -= num_bytes


def count_step(config: dict, plan: Plan, recomputed: frozenset[str] | None = None, height: int | None = None,
               width: int | None = None) -> Step:
    """Counts forward and backward of the plan's U-Net in 16 bits; `recomputed` blocks are computed twice, None: all are.

    `config` is UNet2DConditionModel's. A block's span reaches to where the next one begins, so that spans follow each
    other without gaps; "" is what comes before the first block. Blocks with nothing to learn before them have no span
    in backward. `height` and `width` are in pixels, and the plan's resolution where None.
    """
    with _shapes_only():
        unet, network = _made(config, plan)
        blocks = placeable_blocks(unet)
        recompute_blocks(blocks[name] for name in (blocks if recomputed is None else recomputed))
        parameters = network.parameters()
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        step, counter = Step(), Counter([*unet.parameters(), *parameters, *(parameter.grad for parameter in parameters)])
        last = list(blocks)[-1]
        _mark(blocks, counter, step)
        size = ((height or plan.resolution) // 8, (width or plan.resolution) // 8)
        with counter:
            sample = _forward(unet, config, plan.batch_size, size)
            step.forward[last] = counter.cut()
            torch.nn.functional.mse_loss(sample.float(), torch.zeros_like(sample, dtype=torch.float32)).backward()
            del sample
            counter.cut()
        step.peak_bytes = counter.highest
        return step


def count_table(config: dict, targets: str, shapes: list[tuple[int, int]]) -> Table:
    """Counts steps of one picture at `shapes` (resolution, rank); by two sizes and two ranks it is known how spans grow."""
    spans = {}
    for mode in MODES:
        steps = [count_step(config, _plan(targets, resolution, rank, mode), None if mode == "recomputed" else frozenset())
                 for resolution, rank in shapes]
        for direction in ("forward", "backward"):
            of_steps = [getattr(step, direction) for step in steps]
            spans[mode, direction] = {name: fit_span(shapes, [of_step[name] for of_step in of_steps])
                                      for name in of_steps[0]}
    return Table(num_weights(config), spans)


def num_weights(config: dict) -> dict[str, Weights]:
    """The frozen weights of each block; "" is all outside the blocks."""
    unet = _without_storage(config)
    of_blocks = {name: _weights_of(block, f"{name}.") for name, block in placeable_blocks(unet).items()}
    outside = Weights(*(of_all - sum(in_blocks) for of_all, in_blocks in zip(
        astuple(_weights_of(unet, "")), zip(*map(astuple, of_blocks.values())))))
    return {"": outside} | of_blocks


def block_names(config: dict) -> list[str]:
    """The blocks that can be placed one by one, in the order of a forward pass."""
    return list(placeable_blocks(_without_storage(config)))


def _without_storage(config: dict) -> nn.Module:
    with torch.device("meta"):
        return UNet2DConditionModel(**config)


def _plan(targets: str, resolution: int, rank: int, mode: str) -> Plan:
    return Plan(name="counted", created="2026-01-01", base_model="", images="", targets=targets, resolution=resolution,
                rank=rank, conv_rank=rank if "conv" in targets else 0, int8_activations=mode == "kept in int8", batch_size=1)


@contextmanager
def _shapes_only() -> Iterator[None]:
    def sum_as_on_a_gpu(left: Tensor, right: Tensor) -> Tensor:
        return (left.T @ right).float()  # there the product itself is fp32, with no copies of what goes in

    with (FakeTensorMode(allow_non_fake_inputs=True), patch.object(lora, "_initialise"),  # no values to draw
          patch.object(lora_linear, "sum_over_rows", sum_as_on_a_gpu), patch.object(linear, "sum_over_rows", sum_as_on_a_gpu)):
        yield


def _made(config: dict, plan: Plan) -> tuple[nn.Module, lora.Network]:
    torch.set_default_dtype(torch.bfloat16)
    try:
        unet = UNet2DConditionModel(**config).requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)
    freeze_layers(unet)
    network = attach_lora(unet, plan)
    make_lean(unet, plan.int8_activations)
    network.train(True)
    return unet, network


def _mark(blocks: dict[str, nn.Module], counter: Counter, step: Step) -> None:
    """Ends a span wherever a block begins, and in backward where the gradient of its input is known."""
    before = [""]

    def begins(name: str, hidden_states: Tensor) -> None:
        step.forward[before[-1]] = counter.cut()
        before.append(name)
        if hidden_states.requires_grad:
            hidden_states.register_hook(lambda _: step.backward.__setitem__(name, counter.cut()))

    for name, block in blocks.items():
        block.register_forward_pre_hook(lambda _, inputs, name=name: begins(name, inputs[0]))
    counter.cut()


def _forward(unet: nn.Module, config: dict, batch_size: int, size: tuple[int, int]) -> Tensor:
    pooled_width = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    latents = torch.empty(batch_size, 4, *size, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    text = torch.empty(batch_size, NUM_TEXT_TOKENS, config["cross_attention_dim"], dtype=torch.bfloat16)
    pooled = torch.empty(batch_size, pooled_width, dtype=torch.bfloat16)
    return unet(latents, torch.ones(batch_size), encoder_hidden_states=text, return_dict=False,
                added_cond_kwargs={"text_embeds": pooled, "time_ids": torch.empty(batch_size, 6)})[0]


def _weights_of(module: nn.Module, prefix: str) -> Weights:
    numbers = {"linear": 0, "conv": 0, "exact": 0}
    for name, parameter in module.named_parameters():
        layer, _, kind = name.rpartition(".")
        small = kind == "weight" and IN_BLOCKS.fullmatch(f"{prefix}{layer}")
        numbers[("linear", "conv")[parameter.dim() == 4] if small and parameter.dim() > 1 else "exact"] += parameter.numel()
    return Weights(**numbers)


def main() -> None:
    shapes = [(512, 16), (1024, 16), (512, 128), (1024, 128)]
    tables = {targets: count_table(unet_config(SDXL), targets, shapes) for targets in TARGETS}
    Path(sys.argv[1]).write_text(dump_tables(tables, {name: version(name) for name in ("torch", "diffusers")}))


if __name__ == "__main__":
    main()
