"""A trainer whose blocks are recomputed and streamed as a test wants it, and steps with their gradients."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from crumb.engine.memory.recompute import placeable_blocks, recompute_blocks
from crumb.engine.memory.stream import stream_blocks
from crumb.engine.model.frozen import format_of, freeze_layers
from crumb.engine.model.lean import make_lean
from crumb.engine.model.weights import place

SKIP_WITHOUT_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, SKIP_WITHOUT_CUDA])])
def device(request):
    if request.param == "cuda":  # what the job sets, so that results can be compared bit for bit
        torch.use_deterministic_algorithms(True, warn_only=True)
    yield torch.device(request.param)
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def arranged(trainer, device):
    """make(...) -> trainer, blocks by name, ring. `recompute` and `stream` say of a block's number whether it is."""
    def make(recompute=lambda number: False, stream=lambda number: False, depth=3, quantise="no", lean=True, **settings):
        made = trainer(**settings)
        unet = made.unet.to(device, memory_format=torch.channels_last if lean else torch.preserve_format)
        made.placement = replace(made.placement, device=device)
        if made.encoders:
            made.encoders.text_encoder.to(device)
            made.encoders.text_encoder_2.to(device)
        if lean:
            freeze_layers(unet)
            for name, weight in list(unet.named_parameters()):
                if quantised := format_of(name, weight.shape, quantise):
                    place(unet, name, quantised.of(weight.detach()))
            make_lean(unet)
        blocks = placeable_blocks(unet)
        numbered = list(enumerate(blocks.items()))
        recompute_blocks(block for number, (_, block) in numbered if recompute(number))
        streamed = dict(item for number, item in numbered if stream(number))
        ring = stream_blocks(streamed, device, depth) if streamed else None
        return SimpleNamespace(trainer=made, blocks=blocks, streamed=streamed, ring=ring)
    return make


@pytest.fixture
def steps():
    """Takes steps and returns everything that they computed: each one's loss and the gradients it ended with."""
    def take(arrangement, count=2, between=lambda: None) -> list[dict]:
        trainer, taken = arrangement.trainer, []
        hook = trainer.optimizer.register_step_pre_hook(lambda *_: gradients.extend(
            None if parameter.grad is None else parameter.grad.clone() for parameter in trainer.network.parameters()))
        for step in range(count):
            gradients = []
            fields = trainer.train_step(step)
            taken.append({"loss": fields["loss"], "norm": fields["grad_norm"], "gradients": gradients})
            between()
        hook.remove()
        return taken
    return take


@pytest.fixture
def assert_same():
    """Bit for bit."""
    def compare(found: list[dict], expected: list[dict], what: str) -> None:
        assert len(found) == len(expected)
        for step, (mine, theirs) in enumerate(zip(found, expected)):
            assert (mine["loss"], mine["norm"]) == (theirs["loss"], theirs["norm"]), f"{what}, step {step}"
            assert len(mine["gradients"]) == len(theirs["gradients"]) > 0
            for index, (one, other) in enumerate(zip(mine["gradients"], theirs["gradients"])):
                assert (one is None) == (other is None) and (one is None or torch.equal(one, other)), \
                    f"{what}, step {step}, gradient {index}"
    return compare
