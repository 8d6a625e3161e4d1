"""What the optimizers over one flat buffer share: weights and gradients side by side, each tensor from a whole block on.

    masters     w0 w0 w0 .. | w1 w1 .. | w2 w2 w2 ..      fp32; each parameter is a view of its part
    gradients   g0 g0 g0 .. | g1 g1 .. | g2 g2 g2 ..      fp32 or 16-bit; what autograd adds to, in place

A block of 256 entries so belongs to one tensor, and a kernel finds the tensor's step and whether it takes part by a map from
blocks to tensors. Tensors without a gradient rest, as in torch: no decay, no momentum, no step counted.

A step asks the GPU nothing: clipping, the skipping of gradients that are not finite, step counts and bias corrections are
computed where the gradients are.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from crumb.kernels.block_states import BLOCK
from crumb.kernels.language import cdiv

PLAIN_BLOCKS = 8192
"""Blocks that plain torch works on at a time: 8 MiB for each value in between."""


class FlatOptimizer(Optimizer):
    """Subclasses say what they keep (`states`) and make the step (`_update`).

    `masters` and `gradients` are the flat buffers; `skipped` tells, on the device, whether the last step was skipped.
    """

    _step_supports_amp_scaling = True
    """GradScaler leaves `grad_scale` and `found_inf` here instead of asking the GPU itself, as for torch's fused Adam."""

    live: tuple[str, ...] = ()
    """Names in the groups that show a state and are no settings."""

    def __init__(self, params: Any, defaults: dict[str, Any], gradient_dtype: torch.dtype):
        self._is_laid_out = False
        super().__init__(params, defaults)
        self._parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        device = self._parameters[0].device
        if any(parameter.dtype != torch.float32 or parameter.device != device for parameter in self._parameters):
            raise ValueError(f"{type(self).__name__} takes float32 weights on one device")
        sizes = [cdiv(parameter.numel(), BLOCK) for parameter in self._parameters]
        self.first_blocks = [0]
        for size in sizes:
            self.first_blocks.append(self.first_blocks[-1] + size)
        self.num_blocks = self.first_blocks[-1]
        self.tensor_of = torch.repeat_interleave(torch.arange(len(sizes), dtype=torch.int32), torch.tensor(sizes)).to(device)
        self.masters = torch.zeros(self.num_blocks * BLOCK, device=device)
        self.gradients = torch.zeros_like(self.masters, dtype=gradient_dtype)
        self._gradient_views = list(self._views(self.gradients))
        self._is_written = [False] * len(sizes)
        for index, (parameter, view) in enumerate(zip(self._parameters, self._views(self.masters))):
            view.copy_(parameter.data)
            parameter.data = view
            if gradient_dtype != torch.float32:
                parameter.grad_dtype = gradient_dtype
            parameter.register_hook(self._placer(index))
        self._present: list[bool] | None = None
        self._one = torch.ones(1, device=device)
        self._factor, self._stop = self._one, []
        self.skipped = torch.zeros(1, dtype=torch.bool, device=device)
        self._is_laid_out = True

    def _views(self, flat: Tensor) -> Iterator[Tensor]:
        for parameter, first in zip(self._parameters, self.first_blocks):
            yield flat[first * BLOCK:first * BLOCK + parameter.numel()].view(parameter.shape)

    def _placer(self, index: int) -> Callable[[Tensor], None]:
        """A hook that puts the parameter's part of the buffer in place just before autograd adds a gradient."""
        parameter, view, is_written = self._parameters[index], self._gradient_views[index], self._is_written

        def place(_: Tensor) -> None:
            if parameter.grad is None:
                if is_written[index]:  # somebody else has set the gradient to None, and the old one still stands here
                    view.zero_()
                parameter.grad = view
            is_written[index] = True

        return place

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self._is_laid_out:
            raise ValueError(f"{type(self).__name__} takes all groups at its start")
        super().add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zeroes the buffer at once. None marks parameters that get no gradient until the next step; they rest then."""
        self.gradients.zero_()
        self._is_written[:] = [False] * len(self._is_written)
        self._factor, self._stop = self._one, []
        if set_to_none:
            for parameter in self._parameters:
                parameter.grad = None

    @torch.no_grad()
    def clip_gradients(self, max_norm: float) -> Tensor:
        """The norm of all gradients, on the device. The next step scales them to `max_norm` where it is larger.

        That step is skipped where the norm is not finite. As clip_grad_norm_, but nothing is written and nothing waits.
        """
        self._gather()
        norm = torch.linalg.vector_norm(self.gradients, dtype=torch.float32)
        self._factor = (max_norm / (norm + 1e-6)).clamp(max=1).view(1)
        self._stop = [~norm.isfinite()]
        return norm

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, skip: Tensor | None = None) -> Any:
        """One step; `skip`, one value on the device, leaves everything as it is where it is true."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._gather()
        factor, stop = self._factor, self._stop
        self._factor, self._stop = self._one, []
        if (grad_scale := getattr(self, "grad_scale", None)) is not None:
            factor = factor / grad_scale
        stop = [flag.view(1) != 0 for flag in (*stop, getattr(self, "found_inf", None), skip) if flag is not None]
        self.skipped = torch.stack(stop).any(0) if stop else torch.zeros_like(self.skipped)
        if any(self._present):
            self._update(self._active * ~self.skipped, factor)
        return loss

    def _gather(self) -> None:
        """Brings gradients that stand elsewhere into the buffer and notes which tensors have one."""
        if self._parameters[0].data_ptr() != self.masters.data_ptr():
            raise RuntimeError(f"The weights were moved after {type(self).__name__} was made, as by .to()")
        strangers = []
        for index, (parameter, view) in enumerate(zip(self._parameters, self._gradient_views)):
            grad = parameter.grad
            if grad is None:
                if self._is_written[index]:
                    view.zero_()
                    self._is_written[index] = False
            elif grad is not view:
                strangers.append((parameter, view))
                self._is_written[index] = True
        if strangers:
            torch._foreach_copy_([view for _, view in strangers], [parameter.grad for parameter, _ in strangers])
            for parameter, view in strangers:
                parameter.grad = view
        present = [parameter.grad is not None for parameter in self._parameters]
        if present != self._present:
            self._present = present
            flags = torch.tensor(present, dtype=torch.float32)
            on_gpu = self.masters.is_cuda  # the copy goes on by itself from pinned memory only
            self._active = (flags.pin_memory() if on_gpu else flags).to(self.masters.device, non_blocking=True)

    def _update(self, active: Tensor, factor: Tensor) -> None:
        """`active`: per tensor, 1 where it moves, else 0. `factor`: one value, what gradients are multiplied by."""
        raise NotImplementedError

    def _group_spans(self) -> Iterator[tuple[dict[str, Any], int, int]]:
        """Each group with its first tensor and the one after its last."""
        first = 0
        for group in self.param_groups:
            last = first + len(group["params"])
            yield group, first, last
            first = last

    def _plain_spans(self, first: int, last: int) -> Iterator[tuple[slice, Tensor]]:
        """The blocks of some tensors, so many that plain torch takes at a time, and each one's tensor."""
        end = self.first_blocks[last]
        for start in range(self.first_blocks[first], end, PLAIN_BLOCKS):
            blocks = slice(start, min(start + PLAIN_BLOCKS, end))
            yield blocks, self.tensor_of[blocks].long()

    def states(self) -> dict[str, Tensor]:
        """What a resumed run needs, by name."""
        raise NotImplementedError

    @property
    def num_state_bytes(self) -> int:
        """All that is kept on the device besides weights and gradients."""
        return sum(tensor.nbytes for tensor in (*self.states().values(), self.tensor_of))

    def state_dict(self) -> dict[str, Any]:
        """In torch's form; the flat states stand together as those of parameter 0."""
        groups, first = [], 0
        for group in self.param_groups:
            settings = {name: value for name, value in group.items() if name not in ("params", *self.live)}
            groups.append(settings | {"params": list(range(first, first + len(group["params"])))})
            first += len(group["params"])
        return {"state": {0: self.states()}, "param_groups": groups}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copies a state into place. ValueError where it is another optimizer's or that of other weights."""
        saved = state_dict["state"].get(0, {})
        kept = self.states()
        if {name: tensor.shape for name, tensor in kept.items()} != {
                name: getattr(tensor, "shape", None) for name, tensor in saved.items()}:
            raise ValueError(f"This is no state of {type(self).__name__} over these weights")
        for name, tensor in kept.items():
            tensor.copy_(saved[name])
        for group, settings in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({name: value for name, value in settings.items() if name != "params"})
