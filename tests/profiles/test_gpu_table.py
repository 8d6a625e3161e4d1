"""Computed rates against printed ones, names as drivers report them, and what is guessed for unknown cards."""

import pytest

from crumb.profiles.gpu_table import Gpu, card_fields, find_card, gpu_table, guessed_fields, name_key
from crumb.profiles.hardware import resolve_gpu

QUIRKS = {"no_tensor_cores", "fp16_convolutions"}


@pytest.mark.parametrize(("card", "bf16_or_fp16", "int8"), [
    ("V100", 112, None), ("T4", 65, 130), ("RTX 2080 Ti", 53.8, 215.2), ("Titan RTX", 130.5, 261),
    ("Quadro RTX 5000", 89.2, None), ("RTX 3070", 40.6, 162.5),
    ("RTX 3060", 25.5, 101.9), ("RTX 3080", 59.5, 238), ("RTX 3090", 71.2, 284.7), ("RTX A2000", 31.95, 63.9),
    ("RTX A6000", 154.8, 309.7), ("A10", 125, 250), ("A10G", 70, 140), ("A40", 149.7, 299.3), ("A30", 165, 330),
    ("A100", 312, 624), ("RTX 4060", 30.2, 120.9), ("RTX 4090", 165.2, 660.6), ("L4", 121, 242.5), ("L40", 181, 362),
    ("L40S", 366, 733), ("RTX 6000 Ada", 364.2, 728.5), ("RTX 2000 Ada", 48, 95.9), ("H100", 989.4, 1978.9),
    ("H100 PCIe", 756, 1513), ("H200", 989.4, 1978.9), ("RTX 5090", 209.5, 838), ("RTX 5080", 112.6, 450.2),
    ("RTX 2070 Max-Q", 21.84, 87.37),
])
def test_rates_are_the_printed_ones(card, bf16_or_fp16, int8):
    """White papers' and datasheets' dense figures with fp32 accumulation, within the rounding of a clock."""
    gpu = resolve_gpu(card)
    assert (gpu.bf16_tflops or gpu.fp16_tflops) == pytest.approx(bf16_or_fp16, rel=0.01)
    assert int8 is None or gpu.int8_tops == pytest.approx(int8, rel=0.01)


@pytest.mark.parametrize(("card", "sparse_fp4"), [
    ("RTX 5070", 988), ("RTX 5070 Ti", 1406), ("RTX 5060 Ti", 759), ("RTX 5060", 614), ("RTX 5050", 421)])
def test_rates_of_rtx_50_follow_from_the_advertised_ai_tops(card, sparse_fp4):
    """Sparse fp4 is 16 times bf16 with fp32 accumulation."""
    assert resolve_gpu(card).bf16_tflops * 16 == pytest.approx(sparse_fp4, rel=0.01)


def test_every_card_is_complete_and_plausible():
    families, cards = gpu_table()
    assert len({name_key(card) for card in cards}) == len(cards) >= 100
    for card, values in cards.items():
        for size in values["vram_gib"]:
            gpu = Gpu(card, size, families[values["family"]]["compute_capability"], **card_fields(card, size))
            assert 2 < gpu.fp16_tflops < 1000 and 90 < gpu.bandwidth_gb_per_s < 5000 and gpu.rates_from, card
            assert (bool(gpu.bf16_tflops) == gpu.has_bf16 and gpu.int8_tops > gpu.fp16_tflops) or "V" in card, card
            assert gpu.pcie_generation in (3, 4, 5) and gpu.pcie_lanes in (8, 16) and set(gpu.quirks) <= QUIRKS, card
        assert values["vram_gib"] == sorted(values["vram_gib"]) and find_card(card) == card


def test_versions_of_a_card_differ_by_memory():
    small, large = resolve_gpu("RTX 3060", 8), resolve_gpu("RTX 3060", 12)
    assert (small.bandwidth_gb_per_s, large.bandwidth_gb_per_s) == (240, 360) and small.bf16_tflops == large.bf16_tflops
    assert resolve_gpu("RTX 3050", 6).bf16_tflops < 0.8 * resolve_gpu("RTX 3050 8GB").bf16_tflops
    assert card_fields("RTX 3060", 11.76)["bandwidth_gb_per_s"] == 360, "a driver's figure is a little below the printed one"
    laptop = resolve_gpu("RTX 4060 laptop")
    assert "35 to 115 W" in laptop.rates_from and laptop.pcie_lanes == 8 and laptop.bf16_tflops < 30


@pytest.mark.parametrize(("reported", "card"), [
    ("NVIDIA GeForce RTX 3060 Laptop GPU", "RTX 3060 Laptop"), ("NVIDIA GeForce RTX 3050 6GB Laptop GPU", "RTX 3050 Laptop"),
    ("NVIDIA GeForce RTX 4090 D", "RTX 4090 D"), ("GeForce GTX 1650 SUPER", "GTX 1650 SUPER"),
    ("NVIDIA TITAN RTX", "Titan RTX"),
    ("NVIDIA GeForce RTX 2060 with Max-Q Design", "RTX 2060 Max-Q"), ("NVIDIA RTX A2000 12GB", "RTX A2000"),
    ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"), ("NVIDIA RTX 4000 SFF Ada Generation", "RTX 4000 SFF Ada"),
    ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "RTX PRO 6000 Blackwell"),
    ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "RTX PRO 6000 Blackwell Max-Q"),
    ("Tesla T4", "T4"), ("Tesla V100-SXM2-16GB", "V100"), ("Tesla V100-PCIE-32GB", "V100"), ("NVIDIA A10G", "A10G"),
    ("NVIDIA A100-SXM4-80GB", "A100"), ("NVIDIA A100-PCIE-40GB", "A100"), ("NVIDIA A100 80GB PCIe", "A100"),
    ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H100 PCIe", "H100 PCIe"), ("NVIDIA H200 NVL", "H200"),
    ("GRID T4-16Q", "T4"), ("GRID V100D-32Q", "V100"), ("GRID RTX6000-8Q", "Quadro RTX 6000"), ("NVIDIA A40-48Q", "A40"),
    ("NVIDIA RTX6000-Ada-12Q", "RTX 6000 Ada"), ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "A100"),
    ("NVIDIA RTX A2000 Laptop GPU", None), ("NVIDIA GeForce GTX 1080 Ti", None), ("NVIDIA GB10", None), ("NVIDIA", None),
])
def test_names_that_drivers_report(reported, card):
    assert find_card(reported) == card


def test_unknown_cards_are_taken_as_slow():
    by_cores = guessed_fields("NVIDIA RTX A2000 Laptop GPU", 4, 8.6, 2560)
    assert by_cores["sms"] == 20 and "not in crumb's table" in by_cores["rates_from"]
    assert by_cores["bf16_tflops"] < resolve_gpu("RTX 3050 Ti laptop").bf16_tflops
    without = guessed_fields("NVIDIA Something", 8, 8.9)
    assert without["bf16_tflops"] == pytest.approx(resolve_gpu("RTX 4060 laptop").bf16_tflops)
    assert guessed_fields("NVIDIA B200", 180, 10.0)["bf16_tflops"] < 1000, "as the next older kind"
    turing, small = (guessed_fields(name, 4, 7.5, 896) for name in ("NVIDIA RTX 99", "NVIDIA T1000"))
    assert turing["fp16_tflops"] > 2 * small["fp16_tflops"] and "no_tensor_cores" in small["quirks"] and not turing["quirks"]
    assert guessed_fields("NVIDIA GeForce GTX 1080 Ti", 11, 6.1, 3584) == {}


def test_what_a_link_gives():
    """Three quarters of 15.75 GB/s: PCIe 3.0 x16 and 4.0 x8 are the same, 4.0 x16 twice that."""
    old, narrow, wide = (resolve_gpu(card).pcie_gb_per_s for card in ("RTX 2060", "RTX 4060", "RTX 3060"))
    assert old == pytest.approx(12, abs=0.1) and narrow == pytest.approx(12, abs=0.1) and wide == pytest.approx(24, abs=0.1)
    assert resolve_gpu("cpu").pcie_gb_per_s == 0
