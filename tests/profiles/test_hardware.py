"""GPU names as people type them, and the card in this machine as the driver reports it."""

import sys
from types import SimpleNamespace

import pytest

from crumb.profiles.errors import RequestError
from crumb.profiles.hardware import GIB, count_gpus, detect_gpu, resolve_gpu


class Nvml:
    """pynvml with cards of our own: what is not given here is an NVMLError, as is anything in `broken`."""

    class NVMLError(Exception):
        pass

    def __init__(self, *cards: dict, broken=()):
        self.cards, self.broken, self.is_shut_down = cards, broken, False

    def __getattr__(self, function):
        if not function.startswith("nvml"):
            raise AttributeError(function)

        def ask(card=None, *_):
            if function in self.broken or not isinstance(card, dict) or function not in card:
                raise self.NVMLError(f"{function}: Not Supported")
            return card[function]
        return ask

    def nvmlInit(self):
        if "nvmlInit" in self.broken:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlShutdown(self):
        self.is_shut_down = True

    def nvmlDeviceGetCount(self):
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index):
        if index >= len(self.cards):
            raise self.NVMLError("Invalid Argument")
        return self.cards[index]

    def nvmlDeviceGetHandleByUUID(self, uuid):
        return next(card for card in (*self.cards, *self.pieces()) if card["uuid"] == uuid)

    def nvmlDeviceGetMigDeviceHandleByIndex(self, card, index):
        if not card["pieces"][index]:
            raise self.NVMLError("Not Found")
        return card["pieces"][index]

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, piece):
        return next(card for card in self.cards if piece in card.get("pieces", ()))

    def pieces(self):
        return [piece for card in self.cards for piece in card.get("pieces", ()) if piece]


def card(name, gib, capability, free_gib=1.0, **answers) -> dict:
    return {"nvmlDeviceGetName": name, "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=gib * GIB, free=free_gib * GIB),
            "nvmlDeviceGetCudaComputeCapability": capability, **answers}


@pytest.fixture
def nvml(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def install(*cards, **settings) -> Nvml:
        fake = Nvml(*cards, **settings)
        monkeypatch.setitem(sys.modules, "pynvml", fake)
        return fake
    return install


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


def test_the_card_here_with_its_link_and_free_memory(nvml):
    fake = nvml(card("NVIDIA GeForce RTX 3060", 11.76, (8, 6), free_gib=10.5, nvmlDeviceGetMaxPcieLinkGeneration=3,
                     nvmlDeviceGetCurrPcieLinkWidth=4, nvmlDeviceGetMaxPcieLinkWidth=16))
    gpu = resolve_gpu()
    assert (gpu.name, gpu.vram_gib, gpu.free_gib, gpu.compute_capability) == ("NVIDIA GeForce RTX 3060", 11.8, 10.5, 8.6)
    assert gpu.bf16_tflops == resolve_gpu("RTX 3060 12GB").bf16_tflops and gpu.bandwidth_gb_per_s == 360
    assert (gpu.pcie_generation, gpu.pcie_lanes) == (3, 4) and gpu.pcie_gb_per_s == pytest.approx(3, abs=0.1)
    assert fake.is_shut_down and not gpu.note
    smaller = resolve_gpu(vram_gib=6)
    assert (smaller.vram_gib, smaller.bf16_tflops) == (6, gpu.bf16_tflops)


def test_what_nvml_leaves_open_comes_from_the_table(nvml):
    nvml(card(b"Tesla T4", 14.75, (7, 5)))
    gpu = detect_gpu()
    assert (gpu.name, gpu.pcie_generation, gpu.pcie_lanes, round(gpu.fp16_tflops)) == ("Tesla T4", 3, 16, 65)


def test_a_card_unknown_to_the_table_is_guessed_by_its_cores(nvml):
    nvml(card("NVIDIA RTX 9999", 24, (12, 0), nvmlDeviceGetNumGpuCores=128 * 50))
    gpu = detect_gpu()
    assert gpu.sms == 50 and "not in crumb's table" in gpu.rates_from and gpu.bf16_tflops > 30
    nvml(card("NVIDIA GeForce GTX 1080", 8, (6, 1), nvmlDeviceGetNumGpuCores=2560))
    assert (detect_gpu().fp16_tflops, detect_gpu().vram_gib) == (0, 8)
    nvml(card("GRID T4-8Q", 8, (7, 5)))
    assert "share of a card" in detect_gpu().note


@pytest.mark.parametrize("broken", ["nvmlInit", "nvmlDeviceGetName", "nvmlDeviceGetMemoryInfo"])
def test_without_an_answer_there_is_no_gpu(nvml, broken):
    fake = nvml(card("NVIDIA GeForce RTX 3060", 12, (8, 6)), broken=[broken])
    assert detect_gpu() is None and resolve_gpu().vram_gib == 0
    assert fake.is_shut_down == (broken != "nvmlInit")
    assert count_gpus() == (0 if broken == "nvmlInit" else 1)
    guessed = resolve_gpu("auto", 8)
    assert "taken as RTX 30" in guessed.note and guessed.bf16_tflops > 0


def test_no_package_and_no_card(nvml, monkeypatch):
    nvml()
    assert detect_gpu() is None and count_gpus() == 0
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert detect_gpu() is None and count_gpus() == 0


def test_the_card_that_cuda_would_take(nvml, monkeypatch):
    nvml(card("NVIDIA GeForce RTX 3060", 12, (8, 6), uuid="GPU-a"), card("NVIDIA GeForce RTX 4090", 24, (8, 9), uuid="GPU-b"))
    for visible, name in (("0", "RTX 3060"), ("1,0", "RTX 4090"), ("GPU-b", "RTX 4090"), ("", None), ("-1", None), ("7", None)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        gpu = detect_gpu()
        assert (gpu is None) == (name is None) and (gpu is None or gpu.name.endswith(name)), visible


def test_a_slice_of_a_card_has_its_share(nvml, monkeypatch):
    piece = card("NVIDIA A100-SXM4-40GB MIG 1g.5gb", 4.75, (8, 0), free_gib=4.7, uuid="MIG-x", nvmlDeviceIsMigDeviceHandle=1,
                 nvmlDeviceGetAttributes=SimpleNamespace(multiprocessorCount=14))
    whole = card("NVIDIA A100-SXM4-40GB", 39.5, (8, 0), nvmlDeviceGetMigMode=(1, 1), nvmlDeviceGetMaxMigDeviceCount=2,
                 pieces=[None, piece], uuid="GPU-a")
    nvml(whole)
    gpu = detect_gpu()
    assert (gpu.vram_gib, gpu.free_gib, gpu.sms) == (4.8, 4.7, 14) and "14 of its 108 SMs" in gpu.note
    assert gpu.bf16_tflops == pytest.approx(311.9 * 14 / 108, rel=0.01)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-x")
    assert detect_gpu() == gpu
