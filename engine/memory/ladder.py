"""What to do when memory runs out nevertheless: one rung down, until nothing is left to give up.

What costs only time comes first: more blocks are computed twice, then streamed from host memory, then fewer pictures go
through at a time. A coarser base comes last, because it changes what is computed.
"""

from collections.abc import Sequence
from dataclasses import replace

from crumb.profiles.fit import Fit

COARSER = {"no": "int8", "int8": "nf4"}


def next_rung(fit: Fit, blocks: Sequence[str], may_stream: bool) -> tuple[Fit, str] | None:
    """The next way that takes less memory, and what it is in words; None where this is the last.

    `blocks` are all blocks, those first whose activations are worth most.
    """
    if recomputed := _half_more(fit.recomputed, blocks):
        return replace(fit, recomputed=recomputed), f"{len(recomputed)} of {len(blocks)} blocks compute their activations twice"
    if may_stream and (streamed := _half_more(fit.streamed, blocks)):
        return replace(fit, streamed=streamed), f"the weights of {len(streamed)} of {len(blocks)} blocks come from host memory"
    if fit.micro_batch > 1:
        fewer = (fit.micro_batch + 1) // 2
        return replace(fit, micro_batch=fewer), f"{fewer} of a batch's pictures at a time"
    if fit.quantize_base in COARSER:
        coarser = COARSER[fit.quantize_base]
        return replace(fit, quantize_base=coarser), f"the base is kept in {coarser}, which changes what is computed a little"
    return None


def _half_more(chosen: frozenset[str], blocks: Sequence[str]) -> frozenset[str] | None:
    """Half of what is left besides, all where that is little; None where nothing is left."""
    left = [name for name in blocks if name not in chosen]
    half = (len(left) + 1) // 2
    return chosen | set(left if len(left) <= 8 else left[:half]) if left else None
