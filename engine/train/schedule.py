"""Learning rate over the run: a pure function of the step, so there is no scheduler state to save."""

import math


def learning_rate_factor(scheduler: str, step: int, steps: int, warmup_ratio: float) -> float:
    """What the learning rate is multiplied by at `step` (0-based) of `steps` (SCHED, WARMUP).

    Warm-up rises linearly and reaches 1 at the first step after it.
    """
    if scheduler == "constant_with_warmup":
        num_warmup_steps = math.ceil(steps * warmup_ratio)
        if step < num_warmup_steps:
            return (step + 1) / (num_warmup_steps + 1)
    return 1.0
