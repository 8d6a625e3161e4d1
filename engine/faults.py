"""Faults on purpose: what can go wrong on somebody's machine is made to go wrong in a test, at the place that is named.

CRUMB_FAULT="out of memory: step 3, out of memory: fit check" raises each once, when the engine comes to that place for the
first time; a place named twice fails twice.
"""

import os

import torch

_left: list[str] | None = None


def fault(place: str) -> None:
    """Raises what CRUMB_FAULT wants to go wrong here; nothing in ordinary life."""
    global _left
    if _left is None:
        _left = [entry.strip() for entry in os.environ.get("CRUMB_FAULT", "").split(",") if entry.strip()]
    if _left and f"out of memory: {place}" in _left:
        _left.remove(f"out of memory: {place}")
        raise torch.OutOfMemoryError(f"injected at {place}")
