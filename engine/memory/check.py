"""The fit check: one real pass of the largest pictures before the first step, so that what does not fit shows now."""

import torch

from crumb.engine.faults import fault
from crumb.engine.train.loop import Trainer


def check_fit(trainer: Trainer) -> int | None:
    """Forward and backward of the largest bucket, as many pictures as ever go through at a time; nothing is learned.

    Returns the peak in bytes of what torch has taken of the GPU since the process began, or None on a processor.
    OutOfMemoryError where it does not fit.
    """
    fault("fit check")
    on_gpu = trainer.placement.device.type == "cuda"
    trainer.rehearse()
    if not on_gpu:
        return None
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_reserved()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return peak
