"""Memory by arithmetic, against sums made by hand and against what was counted elsewhere."""

import pytest

from crumb.profiles.fit import Fit
from crumb.profiles.memory_table import Span, fit_span, load_table
from crumb.profiles.vram import Demand, activation_bytes, base_bytes, peak_bytes

MIB, GIB = 2**20, 2**30
TABLE = load_table("attention+ff")
DEMAND = Demand("attention+ff", 16, 0, "AdamW8bit", 1024, 1)
KEPT = Fit(micro_batch=1)
RECOMPUTED = Fit(recomputed=frozenset(TABLE.blocks), micro_batch=1)


@pytest.mark.parametrize(("quantize_base", "mib"), [("no", 4897), ("int8", 2479), ("nf4", 1455)])
def test_the_base_takes_what_the_loaded_unet_was_measured_to_take(quantize_base, mib):
    resident, ring = base_bytes(TABLE, Fit(quantize_base))
    assert resident / MIB == pytest.approx(mib, rel=0.003) and ring == 0


def test_a_streamed_base_leaves_its_ends_and_three_places():
    """103 MiB of ends, samplers and projections; the largest block is an up block's ResBlock of 93.7 MiB in 16 bits."""
    resident, ring = base_bytes(TABLE, Fit(streamed=frozenset(TABLE.blocks)))
    assert resident / MIB == pytest.approx(103, abs=1) and ring / MIB == pytest.approx(3 * 93.7, abs=1)
    one = base_bytes(TABLE, Fit(streamed=frozenset(TABLE.blocks[10:11])))
    assert sum(one) == sum(base_bytes(TABLE, Fit())), "one block that has a place for itself is no gain"


def test_lora_gradients_and_states():
    """42.56 million weights of rank 16: 4 bytes each, 4 of gradients, 2.05 of 8-bit AdamW."""
    found = peak_bytes(TABLE, DEMAND, KEPT)["LoRA, gradients, optimizer"]
    assert found == pytest.approx(42.56e6 * 10.05, rel=1e-3)


@pytest.mark.parametrize(("fit", "mib"), [(KEPT, 3878), (Fit(int8_activations=True, micro_batch=1), 3103), (RECOMPUTED, 567)])
def test_activations_are_those_that_were_counted(fit, mib):
    """tests/engine/memory/test_count.py counts them."""
    assert activation_bytes(TABLE, DEMAND, fit) / MIB == pytest.approx(mib, rel=0.005)


def test_activations_grow_with_pictures_and_precision_and_shrink_with_every_block_recomputed():
    two = Demand("attention+ff", 16, 0, "AdamW8bit", 1024, 2)
    assert activation_bytes(TABLE, two, Fit(micro_batch=2)) == pytest.approx(2 * 3878 * MIB, rel=0.01)
    exact = Demand("attention+ff", 16, 0, "AdamW8bit", 1024, 1, "no")
    assert activation_bytes(TABLE, exact, KEPT) == 2 * activation_bytes(TABLE, DEMAND, KEPT)
    peaks = [activation_bytes(TABLE, DEMAND, Fit(recomputed=frozenset(TABLE.blocks[:count]), micro_batch=1))
             for count in range(0, 88, 8)]
    assert peaks == sorted(peaks, reverse=True) and peaks[-1] < peaks[0] / 4, peaks


def test_a_fit_goes_through_what_was_counted():
    """gained = 100 + 40 m + 3 r + 2 m r, at the four places where it was counted and between them."""
    def gained(resolution, rank):
        megapixels = (resolution / 1024) ** 2
        return 100 + 40 * megapixels + 3 * rank + 2 * megapixels * rank
    shapes = [(512, 16), (1024, 16), (512, 128), (1024, 128)]
    fit = fit_span(shapes, [Span(gained(*shape), 0, 0, 5 * (shape[0] / 1024) ** 4) for shape in shapes])
    for shape in [*shapes, (768, 64), (1536, 8)]:
        found = fit.at(shape[0], 1, shape[1])
        assert found.gained == pytest.approx(gained(*shape))
        assert found.attention_flops == pytest.approx(5 * (shape[0] / 1024) ** 4)
    assert fit.at(1024, 3, 16).attention_flops == pytest.approx(15)
