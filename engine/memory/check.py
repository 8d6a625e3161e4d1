"""The fit check: one real pass of the largest pictures before the first step, so that what does not fit shows now."""

import torch

from crumb.engine.faults import fault
from crumb.engine.train.loop import Trainer


def check_fit(trainer: Trainer) -> int | None:
    """Forward and backward of the largest bucket, as many pictures as ever go through at a time; nothing is learned.

    Returns the most bytes that torch had of the GPU for it; None on a processor, where nothing is tried: a step can take
    minutes there, and the system swaps rather than refuses. OutOfMemoryError where it does not fit.
    """
    fault("fit check")
    if trainer.placement.device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    trainer.rehearse()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_reserved()
    torch.cuda.empty_cache()
    return peak
