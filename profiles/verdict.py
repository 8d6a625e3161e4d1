"""How a run is going, in one word and a remedy, from losses measured on fixed noise (LOSS, FIT, OVERFIT).

The loss of single steps jumps with the noise level that was drawn, so nothing can be read off it; these don't jump.
"""

from dataclasses import dataclass

MIN_DROP = 0.005
"""Of the first loss: a smaller fall than this is no learning yet."""

MIN_RISE = 0.1
"""Of what had been gained on held-out pictures: losing more than this again is overfitting."""

FLAT = 0.05
"""Of the whole fall: what the last third adds to a run that is fitted."""

MIN_JUDGINGS = 4

WORSE = 1.1
"""Times the first training loss: above this the run does not learn badly, it falls apart."""


@dataclass(frozen=True)
class Judged:
    """Mean loss at fixed noise and noise levels after `step`.

    `held_out_loss` is None where no picture was held out; both are where the U-Net's answer was no number.
    """

    step: int
    training_loss: float | None
    held_out_loss: float | None

    @property
    def telling_loss(self) -> float | None:
        """The one that says more about new prompts."""
        return self.training_loss if self.held_out_loss is None else self.held_out_loss


@dataclass(frozen=True)
class Verdict:
    """`word`: learning | fitted | overfitting | not learning | falling apart, or "" too early; `basis`: what it rests on."""

    word: str
    remedy: str = ""
    basis: str = ""


def best_of(history: list[Judged]) -> Judged | None:
    """The lowest held-out loss after the start; None where nothing was held out, since training loss only ever falls."""
    measured = [judged for judged in history if judged.step > 0 and judged.held_out_loss is not None]
    return min(measured, key=lambda judged: judged.held_out_loss, default=None)


def verdict(history: list[Judged], steps: int) -> Verdict:
    """What the judgings so far say about a run of `steps` steps; `history` starts with step 0."""
    first, last = history[0], history[-1]
    if len(history) > 1 and (last.training_loss is None or last.training_loss > first.training_loss * WORSE):
        kept = best_of(history)
        file = f"Take the file of step {kept.step}, if any. " if kept and kept is not last else ""
        return Verdict("falling apart", f"{file}Start anew with a lower learning rate or lower alpha.", _basis(first, last))
    if len(history) < MIN_JUDGINGS:
        return Verdict("", basis=f"a verdict takes {MIN_JUDGINGS} measurements and there are {len(history)}; judge_every sets "
                                 f"how often")
    basis = _basis(first, last)
    if last.training_loss > first.training_loss * (1 - MIN_DROP):
        if last.step < steps / 2:
            return Verdict("", basis=basis)
        return Verdict("not learning", "Raise the learning rate or the rank, or train longer (FIT).", basis)
    best = best_of(history)
    if best and last.held_out_loss - min(best.held_out_loss, first.held_out_loss) > _tolerated_rise(first, best):
        better = best.held_out_loss < first.held_out_loss
        take = f"Take the file of step {best.step}." if better else "No step was better than the base on pictures it never saw."
        return Verdict("overfitting", f"{take} Next time fewer steps, a lower rank, more pictures, or regularization pictures "
                                      f"(FIT, REG).", basis)
    known = [judged for judged in history if judged.training_loss is not None]
    fall = first.telling_loss - min(judged.telling_loss for judged in known)
    earlier = [judged.telling_loss for judged in known if judged.step <= last.step * 2 / 3]
    if min(earlier) - last.telling_loss < FLAT * fall:
        return Verdict("fitted", "The last third changed little: this is what these settings learn. Not alike enough? "
                                 "Raise the rank (FIT).", basis)
    ended = last.step >= steps
    return Verdict("learning", "It was still getting better at the end: train longer (FIT)." if ended else "", basis)


def _tolerated_rise(first: Judged, best: Judged) -> float:
    """A tenth of what was gained; and, however little that is, what a few held-out pictures may wander."""
    return max(MIN_RISE * (first.held_out_loss - best.held_out_loss), MIN_DROP * first.held_out_loss)


def _basis(first: Judged, last: Judged) -> str:
    if last.training_loss is None:
        return f"the loss on training pictures was {first.training_loss:.4f} and is no number any more"
    training = f"training pictures {first.training_loss:.4f} -> {last.training_loss:.4f}"
    if last.held_out_loss is None:
        return f"{training}; none is held out, so overfitting can't be seen in numbers: look at the sample pictures"
    return f"{training}, held-out {first.held_out_loss:.4f} -> {last.held_out_loss:.4f}"
