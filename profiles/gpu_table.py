"""What is known of NVIDIA's cards: gpus.toml by name, and a careful guess for cards that are not in it."""

import re
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

PCIE_GB_PER_S_PER_LANE = {1: 0.25, 2: 0.5, 3: 0.985, 4: 1.969, 5: 3.938, 6: 7.563}
"""One way, after line coding."""

PCIE_SHARE = 0.76
"""Of that, what large copies from pinned memory reach: about 12 GB/s over 3.0 x16. Assumed, not measured here."""

LAPTOP_LANES = 8

WRAPPING = re.compile(
    r"\bmig\b.*|nvidia|geforce|tesla|grid|gpu|generation|edition|workstation|server|with|design|sxm\d?|hbm\d?e?|fhhl")
"""What drivers and shops put around a card's name."""

VIRTUAL = re.compile(r"[dxlp]?-\d+[abcq]$")
"""The profile at the end of a virtual GPU's name, such as V100D-32Q."""

MEMORY_SIZE = re.compile(r"\b(\d+)\s*g(?:i?b)?\b", re.IGNORECASE)


@dataclass(frozen=True)
class Gpu:
    """A card to plan for; `vram_gib` 0 means no GPU at all. A rate of 0 is one it has not, or that nobody knows."""

    name: str
    vram_gib: float
    compute_capability: float
    free_gib: float | None = None
    """Free memory now; None when the card is only a name in the table."""
    note: str = ""
    sms: int = 0
    fp16_tflops: float = 0.0
    """Dense, accumulated in fp32, at boost clock; so are the others."""
    bf16_tflops: float = 0.0
    fp32_tflops: float = 0.0
    """On the CUDA cores."""
    int8_tops: float = 0.0
    fp8_tflops: float = 0.0
    bandwidth_gb_per_s: float = 0.0
    """Of its own memory."""
    pcie_generation: int = 0
    pcie_lanes: int = 0
    quirks: tuple[str, ...] = ()
    """Of no_tensor_cores and fp16_convolutions (they may give NaN)."""
    rates_from: str = ""
    """How the rates came about."""

    @property
    def has_bf16(self) -> bool:
        return self.compute_capability >= 8.0

    @property
    def pcie_gb_per_s(self) -> float:
        """What copies from pinned memory reach; 0 where the link is not known."""
        return PCIE_GB_PER_S_PER_LANE.get(self.pcie_generation, 0.0) * self.pcie_lanes * PCIE_SHARE

    def tflops(self, precision: str) -> float:
        """The rate of `mixed_precision`'s products: no | fp16 | bf16."""
        return {"no": self.fp32_tflops, "fp16": self.fp16_tflops, "bf16": self.bf16_tflops}[precision]


@cache
def gpu_table() -> tuple[dict[str, dict], dict[str, dict]]:
    """(families, cards), cards by name with every number of theirs a list as long as `vram_gib`."""
    table = tomllib.loads(files("crumb.profiles").joinpath("gpus.toml").read_text(encoding="utf-8"))
    laptops = {name: {"pcie": [table["families"][card["family"]]["pcie"][0], LAPTOP_LANES]} | card
               for name, card in table["laptops"].items()}
    cards = table["cards"] | laptops
    for card in cards.values():
        sizes = card["vram_gib"] if isinstance(card["vram_gib"], list) else [card["vram_gib"]]
        card |= {"vram_gib": sizes} | {name: card[name] if isinstance(card[name], list) else [card[name]] * len(sizes)
                                       for name in ("sms", "mhz", "gb_per_s")}
    return table["families"], cards


def name_key(name: str) -> str:
    """A card's name as it is compared: what it is called, without who made it, its memory and its form."""
    bare = VIRTUAL.sub("", MEMORY_SIZE.sub("", name.lower()))
    return re.sub(r"[^a-z0-9]", "", WRAPPING.sub("", bare))


def find_card(name: str) -> str | None:
    """The table's name of the card that a driver or a person calls so; None where it is not in the table."""
    by_key = {name_key(card): card for card in gpu_table()[1]}
    key = name_key(name)
    older = ["quadro" + key] if is_virtual(name) else []
    for candidate in (key, "rtx" + key, "gtx" + key, *older, re.sub("pcie|nvl", "", key)):
        if candidate in by_key:
            return by_key[candidate]
    return None


def is_virtual(name: str) -> bool:
    return bool(VIRTUAL.search(name.lower()))


def card_fields(card_name: str, vram_gib: float) -> dict:
    """The fields of `Gpu` that the table knows, for the version of the card with about that memory."""
    families, cards = gpu_table()
    card = cards[card_name]
    family = families[card["family"]]
    version = min(range(len(card["vram_gib"])), key=lambda at: abs(card["vram_gib"][at] - vram_gib))
    sms, mhz = card["sms"][version], card["mhz"][version]
    source = f"{sms} SMs x {mhz} MHz"
    if "tgp_w" in card:
        source += ", a clock for {} to {} W".format(*card["tgp_w"])
    generation, lanes = card.get("pcie", family["pcie"])
    return _rates(family | card, sms, mhz) | {
        "bandwidth_gb_per_s": float(card["gb_per_s"][version]), "pcie_generation": generation, "pcie_lanes": lanes,
        "rates_from": source}


def guessed_fields(name: str, vram_gib: float, compute_capability: float, num_cores: int = 0) -> dict:
    """The same for a card that is not in the table, as slow as the slowest of its kind; empty below Volta.

    Of its kind: of its compute capability or the next older one, and of about its memory.
    """
    families, cards = gpu_table()
    kind = _kind(name, compute_capability)
    if kind is None:
        return {}
    family = families[kind]
    versions = [(sms, mhz, speed, abs(size - vram_gib)) for card in cards.values() if card["family"] == kind
                for sms, mhz, speed, size in zip(card["sms"], card["mhz"], card["gb_per_s"], card["vram_gib"], strict=True)]
    nearest = min(version[3] for version in versions)
    alike = [version for version in versions if version[3] == nearest]
    sms, mhz = min(((sms, mhz) for sms, mhz, _, _ in alike), key=lambda pair: pair[0] * pair[1])
    source = "not in crumb's table: taken as the slowest like it"
    if num_cores:
        sms, mhz = max(1, num_cores // family["cores_per_sm"]), min(mhz for _, mhz, _, _ in versions)
        source = f"not in crumb's table: {sms} SMs x {mhz} MHz, the lowest clock like it"
    generation, lanes = family["pcie"][0], min(family["pcie"][1], LAPTOP_LANES)
    return _rates(family, sms, mhz) | {
        "bandwidth_gb_per_s": float(min(speed for _, _, speed, _ in alike)), "pcie_generation": generation, "pcie_lanes": lanes,
        "rates_from": source}


def _kind(name: str, compute_capability: float) -> str | None:
    """The consumer family, which is the slower one, of that compute capability or the next older one."""
    older = {family: values["compute_capability"] for family, values in gpu_table()[0].items()
             if values["compute_capability"] <= compute_capability}
    if not older:
        return None
    kind = next(family for family, capability in older.items() if capability == max(older.values()))
    # T1000, MX450 and others of Turing have no tensor cores; all that have are called RTX.
    return "turing_gtx" if kind == "turing" and "rtx" not in name.lower() else kind


def _rates(family: dict, sms: int, mhz: int) -> dict:
    def per_second(operation: str) -> float:
        return sms * mhz * 1e6 * family.get(operation, 0) / 1e12

    return {"sms": sms, "fp16_tflops": per_second("fp16"), "bf16_tflops": per_second("bf16"), "fp32_tflops": per_second("fp32"),
            "int8_tops": per_second("int8"), "fp8_tflops": per_second("fp8"), "quirks": tuple(family.get("quirks", ()))}
