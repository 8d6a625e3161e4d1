"""What a person answers, before anything is derived from it."""

from dataclasses import dataclass, field

SUBJECTS = ("character", "face", "style", "concept")
LOOKS = ("realistic", "anime")


@dataclass(kw_only=True)
class Answers:
    """The interview's answers. Everything else follows from them, the pictures and the base's header."""

    images: str = ""
    """Folder of pictures."""
    subject: str = "character"
    """What is being taught: one of SUBJECTS."""
    base: str = ""
    """SDXL file or diffusers folder."""
    vae: str = ""
    """A VAE file, where the base has none baked in or a better one is wanted."""
    prediction: str = ""
    """epsilon or v_prediction, asked only where the base does not say."""
    gpu: str = "auto"
    """auto, cpu or a card's name."""
    vram_gib: float | None = None
    """GPU memory in GiB; None = what the card has."""
    look: str = "realistic"
    """One of LOOKS."""
    trigger: str = ""
    """The word that will call the LoRA."""
    class_word: str = ""
    """What the subject is in one common word; empty = by subject."""
    name: str = ""
    """Run name; empty = from the trigger or the folder."""
    flip: bool = False
    """Pictures may be shown mirrored: no text, no side that matters."""
    skip_broken: bool = False
    """Consent to train without pictures that can't be read."""
    overrides: dict = field(default_factory=dict)
    """Plan settings that the person fixed themselves, by name."""
