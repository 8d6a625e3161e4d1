"""Which parts of the U-Net are placed one by one, and computing chosen ones a second time instead of keeping what they made."""

from collections.abc import Callable, Iterable
from functools import partial
from itertools import zip_longest

from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, is_grad_enabled, nn
from torch.utils.checkpoint import checkpoint

from crumb.engine.network.lora import LoRALayer


def placeable_blocks(unet: nn.Module) -> dict[str, nn.Module]:
    """The U-Net's transformer and residual blocks by name, in the order in which a forward pass comes to them."""
    names = {module: name for name, module in unet.named_modules()}
    blocks = {}
    for part in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
        in_turn = [module for pair in zip_longest(part.resnets, getattr(part, "attentions", ())) for module in pair if module]
        for block in (block for module in in_turn for block in module.modules()):
            if isinstance(block, BasicTransformerBlock | ResnetBlock2D):
                blocks[names[block]] = block
    return blocks


def recompute_blocks(blocks: Iterable[nn.Module]) -> None:
    """Has each block keep nothing but its inputs for backward, which computes it again. In place, and after LoRA is attached.

    A block whose forward is wrapped in something else as well (stream.py) is wrapped by this first.
    """
    for block in blocks:
        learns = any(parameter.requires_grad for parameter in block.parameters())
        # Dropout must leave out the same again. Elsewhere the state of the generators, of a GPU's too, is not worth taking.
        draws = any(isinstance(module, LoRALayer) and module.dropout.is_on for module in block.modules())
        block.forward = partial(_recomputed, block.forward, learns, draws)


def _recomputed(forward: Callable[..., Tensor], learns: bool, draws: bool, *args, **kwargs) -> Tensor:
    inputs = (*args, *kwargs.values())
    # What has nothing to learn in it or before it is never gone back through, and must not keep its inputs either.
    if not is_grad_enabled() or not (learns or any(isinstance(x, Tensor) and x.requires_grad for x in inputs)):
        return forward(*args, **kwargs)
    # The second time is like the first: the check that it was would look at every tensor kept, on the host.
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=draws, determinism_check="none", **kwargs)
