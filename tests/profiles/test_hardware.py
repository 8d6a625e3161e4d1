"""GPU names as people type them."""

import pytest

from crumb.profiles.errors import RequestError
from crumb.profiles.hardware import resolve_gpu


@pytest.mark.parametrize(("typed", "vram", "name", "vram_gib", "capability"), [
    ("RTX 3060", None, "RTX 3060", 8, 8.6),
    ("rtx3060", 12, "RTX 3060", 12, 8.6),
    ("NVIDIA GeForce RTX 3060 12GB", None, "RTX 3060", 12, 8.6),
    ("4090", None, "RTX 4090", 24, 8.9),
    ("3060 ti", None, "RTX 3060 Ti", 8, 8.6),
    ("1660 super", None, "GTX 1660 SUPER", 6, 7.5),
    ("Tesla T4", None, "T4", 16, 7.5),
    ("A100 80GB", None, "A100", 80, 8.0),
    ("cpu", None, "no GPU (CPU)", 0, 0.0),
])
def test_names(typed, vram, name, vram_gib, capability):
    gpu = resolve_gpu(typed, vram)
    assert (gpu.name, gpu.vram_gib, gpu.compute_capability) == (name, vram_gib, capability)


def test_a_card_of_several_sizes_says_so():
    assert "12 GiB" in resolve_gpu("RTX 3060").note and not resolve_gpu("RTX 3060", 12).note


def test_unknown_card_names_the_nearest():
    with pytest.raises(RequestError, match="RTX 4070"):
        resolve_gpu("RTX 4071")
    with pytest.raises(RequestError, match="--vram"):
        resolve_gpu("Voodoo 2")
    with pytest.raises(RequestError, match="can't be right"):
        resolve_gpu("auto", float("nan"))
