"""The Plan: everything a run needs, as one flat dataclass and one commented TOML file.

The fields below are the only list of settings: the file's sections, the checks on loading, the
wizard's help and the names in `crumb plan --json` are all read off them.
"""

import dataclasses
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomlkit

from crumb.profiles.checks import checked, from_text, nearest, toml_value
from crumb.profiles.checks import setting as _setting
from crumb.profiles.errors import RequestError
from crumb.profiles.optimizers import OPTIMIZERS
from crumb.profiles.plan_rules import BLOCK_BOUNDS, check_block_values, check_together
from crumb.profiles.subsets import check_subsets

PLAN_VERSION = 1

SCHEDULERS = ("constant", "constant_with_warmup")
TARGETS = ("attention", "attention+ff", "attention+ff+conv")
PRECISIONS = ("no", "fp16", "bf16")


@dataclass(kw_only=True)
class Plan:
    """All settings of one run. `help` texts are the effect in plain words, units included."""

    name: str = _setting("run", "Run folder, file name and the word in <lora:NAME:1>")
    created: str = _setting("run", "When the plan was made (ISO 8601); written into the LoRA file as its date")
    seed: int = _setting("run", "Where all random numbers come from; the same seed repeats a run", 42, low=0, high=2**31 - 1)
    device: str = _setting("run", "Where to train", "auto", choices=("auto", "cuda", "cpu"))

    base_model: str = _setting("base", "SDXL .safetensors file or diffusers folder")
    vae: str = _setting("base", "VAE file to use instead of the base's own; empty = the base's own", "")
    prediction_type: str = _setting(
        "base", "What the base model predicts", "epsilon", choices=("epsilon", "v_prediction"))
    zero_terminal_snr: bool = _setting("base", "The base was trained with zero terminal SNR", False)
    clip_skip: int = _setting("base", "Which layer of the text encoders is read, counted from the end; SDXL's own is 2", 2,
                              low=1, high=12)

    images: str = _setting("data", "Folder of pictures, captions beside them as .txt or .caption")
    trigger: str = _setting("data", "Word that calls the LoRA; put before every caption that lacks it", "")
    class_word: str = _setting("data", "What the subject is in one common word; used where a caption is missing", "")
    resolution: int = _setting(
        "data", "Pixels; training area is its square. SDXL: 1024", 1024, low=64, high=2048)
    buckets: bool = _setting("data", "Keep aspect ratios by training in buckets of one size each", True)
    upscale: bool = _setting("data", "Enlarge pictures that are smaller than their bucket", False)
    repeats: int = _setting("data", "Times each picture is seen per epoch; below a folder named N_name, N times that", 1,
                            low=1, high=10_000)
    held_out_pictures: int = _setting("data", "Pictures that are only measured, never trained on; they show overfitting", 0,
                                      low=0, high=1000)
    skip_broken: bool = _setting("data", "Train without the pictures that can't be read", False)
    flip: bool = _setting("data", "Show half of the views mirrored; not where there is text or a side that matters", False)
    masked_loss: str = _setting("data", "Learn only where a mask is white: the picture's alpha channel, or a file "
                                "NAME-masklabel.png beside it", "off", choices=("off", "alpha", "files"))
    mask_floor: float = _setting("data", "What the rest counts beside the mask's white; 0 = nothing", 0.0, low=0, high=1)
    regularization: str = _setting("data", "Folder of pictures of what must not be forgotten; empty = none", "")
    prior_loss_weight: float = _setting("data", "What the loss of regularization pictures counts", 1.0, low=0, high=100)
    subsets: list = _setting("data", "Further folders with settings of their own: {images = \"DIR\", repeats = 3, ...}", [],
                             items=dict)

    shuffle_captions: bool = _setting("captions", "Shuffle the tags (what stands between commas), each view anew", False)
    keep_tokens: int = _setting("captions", "Tags at the front that are never moved or left out, as the trigger word is", 1,
                                low=0, high=100)
    tag_dropout: float = _setting("captions", "Share of tags left out at random, each view anew", 0.0, low=0, high=0.95)
    caption_dropout: float = _setting("captions", "Share of views without any caption", 0.0, low=0, high=1)
    caption_prefix: str = _setting("captions", "Words before every caption, behind which nothing is shuffled in", "")
    caption_suffix: str = _setting("captions", "Words behind every caption", "")
    caption_variants: int = _setting("captions", "How many shuffles of each caption are encoded and kept on disk", 8, low=1,
                                     high=256)
    max_token_length: int = _setting("captions", "Tokens of a caption that are read; above 75 in chunks of 75", 75,
                                     choices=(75, 150, 225))

    method: str = _setting("network", "What is trained", "lora", choices=("lora",))
    targets: str = _setting("network", "Which layers learn; conv adds the 3x3 convolutions", "attention+ff",
                            choices=TARGETS)
    rank: int = _setting("network", "Capacity; more = larger file, more VRAM, more learned", 32, low=1, high=1024)
    alpha: float = _setting("network", "The LoRA is scaled by alpha / rank", 16.0, low=0.1, high=1024)
    conv_rank: int = _setting("network", "Rank of the 3x3 convolutions; 0 = they don't learn", 0, low=0, high=1024)
    conv_alpha: float = _setting("network", "Alpha of the 3x3 convolutions", 1.0, low=0.1, high=1024)

    block_ranks: dict = _setting("network", "Ranks of single U-Net blocks, such as {IN08 = 64}; others take rank", {})
    block_alphas: dict = _setting("network", "Alphas of single U-Net blocks; others take alpha", {})
    conv_block_ranks: dict = _setting("network", "Ranks of single blocks' 3x3 convolutions; others take conv_rank", {})
    conv_block_alphas: dict = _setting("network", "Alphas of single blocks' 3x3 convolutions; others take conv_alpha", {})
    block_rates: dict = _setting("network", "Factors on the learning rate of single U-Net blocks; 0 = it doesn't learn", {})
    network_dropout: float = _setting("network", "Share of the LoRA's inner values left out at random", 0.0, low=0, high=0.9)
    rank_dropout: float = _setting("network", "Share of ranks left out at random, for each picture anew", 0.0, low=0,
                                   high=0.9)
    module_dropout: float = _setting("network", "Share of modules left out at random, for each pass anew", 0.0, low=0,
                                     high=0.9)
    max_norm: float = _setting("network", "Longest change of a module; longer ones are scaled down after a step; 0 = off",
                               0.0, low=0, high=1000)
    start_from: str = _setting("network", "LoRA file to go on from, of the same or another rank; empty = start anew", "")

    steps: int = _setting("training", "Optimizer steps in all", 1000, low=1, high=1_000_000)
    batch_size: int = _setting("training", "Pictures per forward pass", 1, low=1, high=64)
    gradient_accumulation_steps: int = _setting("training", "Forward passes per step", 1, low=1, high=1024)
    mixed_precision: str = _setting("training", "Number format of the base while training; no = fp32", "bf16",
                                    choices=PRECISIONS)
    gradient_checkpointing: bool = _setting("training", "Recompute activations: less VRAM, about a third slower", True)
    max_grad_norm: float = _setting("training", "Gradients are clipped to this norm; 0 = off", 1.0, low=0, high=1000)

    noise_offset: float = _setting("noise", "Shifts the noise per channel for dark or bright pictures; 0 = off", 0.0,
                                   low=0, high=1)
    multires_noise_iterations: int = _setting("noise", "Adds coarser and coarser noise, this many times; 0 = off", 0,
                                              low=0, high=64)
    multires_noise_discount: float = _setting("noise", "What each coarser noise is multiplied by once more", 0.3,
                                              low=0, high=1)
    input_perturbation: float = _setting("noise", "Further noise that the U-Net sees but need not predict; 0 = off", 0.0,
                                         low=0, high=1)
    timestep_sampling: str = _setting("noise", "Which noise levels are trained: all alike, or the middle more often",
                                      "uniform", choices=("uniform", "logit_normal"))
    timestep_min: int = _setting("noise", "First noise level that is trained; 0 is the cleanest", 0, low=0, high=999)
    timestep_max: int = _setting("noise", "The noise level to stop before; 1000 trains up to pure noise", 1000,
                                 low=1, high=1000)
    logit_mean: float = _setting("noise", "Centre of logit_normal: below 0 cleaner, above 0 noisier", 0.0, low=-10, high=10)
    logit_std: float = _setting("noise", "Width of logit_normal", 1.0, low=0.01, high=10)

    loss_type: str = _setting("loss", "l2, or a kind that single wild pixels pull less", "l2",
                              choices=("l2", "huber", "smooth_l1"))
    huber_c: float = _setting("loss", "Where huber and smooth_l1 turn from square to straight", 0.1, low=1e-4, high=10)
    huber_schedule: str = _setting("loss", "How huber_c changes with the noise level", "snr",
                                   choices=("constant", "exponential", "snr"))
    loss_weighting: str = _setting("loss", "What the noise levels count: alike, less where the task is easy, or more where "
                                   "it is hard", "none", choices=("none", "min_snr", "debiased"))
    min_snr_gamma: float = _setting("loss", "Signal-to-noise ratio above which min_snr weighs less; 5 is usual", 5.0,
                                    low=0.1, high=100)

    optimizer: str = _setting("optimizer", "The rule that turns gradients into learning", "AdamW8bit",
                              choices=OPTIMIZERS)
    optimizer_args: dict = _setting("optimizer", "Further arguments of the optimizer", {})
    learning_rate: float = _setting("optimizer", "How strongly each step learns", 1e-4, low=1e-9, high=10)
    text_encoder_learning_rate: float = _setting("optimizer", "Rate of text encoder 1 (CLIP-L); 0 = it doesn't learn", 0.0,
                                                 low=0, high=10)
    text_encoder_2_learning_rate: float = _setting("optimizer", "Rate of text encoder 2 (bigG); 0 = it doesn't learn", 0.0,
                                                   low=0, high=10)
    text_encoder_stop_after: float = _setting("optimizer", "Share of all steps in which the text encoders learn", 1.0,
                                              low=0, high=1)
    lora_plus_ratio: float = _setting("optimizer", "LoRA+: how much faster lora_up learns than lora_down; 1 = alike", 1.0,
                                      low=0.01, high=100)
    scheduler: str = _setting("optimizer", "How the rate changes over the run", "constant", choices=SCHEDULERS)
    warmup_ratio: float = _setting("optimizer", "Share of all steps in which the rate rises to full", 0.1, low=0, high=1)

    cache_latents: bool = _setting("memory", "Encode each picture once and keep the result on disk", True,
                                   choices=(True,))
    quantize_base: str = _setting("memory", "Keep the frozen base in int8 (half the memory) or nf4 (a third); the LoRA "
                                  "fits any base", "no", choices=("no", "int8", "nf4"))
    int8_activations: bool = _setting("memory", "Keep the largest activations in int8 until backward: less VRAM, gradients a "
                                      "percent off", False)
    vae_tiling: bool = _setting("memory", "Run the VAE in tiles: less VRAM, a little slower", False)
    vram_gib: float = _setting("memory", "GPU memory this plan was made for, GiB; 0 = no GPU", 0.0, low=0, high=1024)

    save_precision: str = _setting("output", "Number format in the LoRA file", "fp16",
                                   choices=("float", "fp16", "bf16"))
    save_every: int = _setting("output", "Steps between checkpoints; 0 = only at the end", 250, low=0, high=1_000_000)
    keep_checkpoints: int = _setting("output", "How many of the newest checkpoints to keep", 3, low=1, high=1000)
    judge_every: int = _setting("output", "Steps between measurements on fixed noise; 0 = only first and last", 250, low=0,
                                high=1_000_000)
    trackers: list = _setting("output", "Where else the numbers go: tensorboard, wandb, mlflow and others; empty = nowhere", [])
    sample_every: int = _setting("output", "Steps between sample pictures; 0 = none", 250, low=0, high=1_000_000)
    sample_prompts: list = _setting(
        "output", "One picture is made of each; may end in --n negative --d seed --w width --h height --l guidance --s steps",
        [])
    sample_negative: str = _setting("output", "What sample pictures should not show, where the prompt has no --n", "")
    sample_steps: int = _setting("output", "Denoising steps per sample picture", 20, low=1, high=200)
    sample_guidance: float = _setting("output", "Classifier-free guidance of sample pictures", 6.0, low=1, high=30)

    @property
    def text_encoders_learn(self) -> bool:
        return max(self.text_encoder_learning_rate, self.text_encoder_2_learning_rate) > 0

    @property
    def num_text_steps(self) -> int:
        """The first so many steps are those in which the text encoders learn."""
        return round(self.steps * self.text_encoder_stop_after) if self.text_encoders_learn else 0

    @property
    def num_caption_variants(self) -> int:
        """Where the text encoders learn nothing is cached, and every view may be a text of its own."""
        return 1 << 30 if self.text_encoders_learn else self.caption_variants

    def __post_init__(self):
        for setting in dataclasses.fields(self):
            setattr(self, setting.name, checked(setting, getattr(self, setting.name)))
        self.subsets = check_subsets(self.subsets, plan_fields())
        check_together(self)


def plan_fields() -> dict[str, dataclasses.Field]:
    return {setting.name: setting for setting in dataclasses.fields(Plan)}


def load_plan(path: Path) -> Plan:
    """Reads and checks a plan file; every mistake is a RequestError that names the place and the mend."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RequestError(f"There is no plan at {path}. Make one with `crumb plan --images DIR --base FILE`.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"The plan {path} can't be read: {error}.") from None
    return parse_plan(text, source=str(path))


def parse_plan(text: str, source: str = "the plan") -> Plan:
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RequestError(f"{source} is not valid TOML: {error}. Mend that line, or make the plan anew.") from None
    version = document.pop("plan_version", None)
    if version != PLAN_VERSION:
        raise RequestError(f"{source} has plan_version {version!r}; this crumb reads {PLAN_VERSION}. Make the plan anew.")
    values = {}
    for section, content in document.items():
        if not isinstance(content, dict) or section not in _sections():
            raise RequestError(f"{source}: unknown section [{section}]." + nearest(section, _sections()))
        for key, value in content.items():
            _check_key(key, section, source)
            values[key] = value
    for name, setting in plan_fields().items():
        if name not in values and setting.default is setting.default_factory is dataclasses.MISSING:
            raise RequestError(f"{source}: {name} is missing from [{setting.metadata['section']}]: "
                               f"{setting.metadata['help']}.")
    try:
        return Plan(**values)
    except RequestError as error:
        raise RequestError(f"{source}: {error}") from None


def load_plan_to_move(path: Path) -> tuple[Plan, str]:
    """A plan file's plan and text with paths that hold from any folder."""
    load_plan(path)
    text = with_absolute_paths(path.read_text(encoding="utf-8"), path.absolute().parent)
    return parse_plan(text, source=str(path)), text


def with_absolute_paths(text: str, folder: Path) -> str:
    """The plan's text with relative paths taken from `folder`, so that it may be moved; comments stay."""
    document = tomlkit.parse(text)
    base, data = document.get("base", {}), document.get("data", {})
    for table, key in ((base, "base_model"), (base, "vae"), (document.get("network", {}), "start_from"), (data, "images"),
                       (data, "regularization"), *((subset, "images") for subset in data.get("subsets", []))):
        value = table.get(key)
        if value and not Path(value).is_absolute():
            table[key] = str((folder / Path(value).expanduser()).absolute())
    return tomlkit.dumps(document)


def dump_plan(plan: Plan, reasons: dict[str, str] | None = None, notes: list[str] = ()) -> str:
    """The plan as TOML, each value under its help text and, where derived, its reason."""
    document = tomlkit.document()
    document.add(tomlkit.comment("A crumb training plan. Edit what you like; `crumb train THIS_FILE` checks every value."))
    for note in notes:
        document.add(tomlkit.comment(note))
    document.add("plan_version", PLAN_VERSION)
    for section in _sections():
        table = tomlkit.table()
        for name, setting in plan_fields().items():
            if setting.metadata["section"] != section:
                continue
            choices = setting.metadata["choices"]
            allowed = f" ({' | '.join(map(str, choices))})" if choices and len(choices) > 1 else ""
            table.add(tomlkit.comment(f"{setting.metadata['help']}{allowed}"))
            if reasons and name in reasons:
                table.add(tomlkit.comment(f"  why: {reasons[name]}"))
            table.add(name, toml_value(getattr(plan, name)))
        document.add(section, table)
    return tomlkit.dumps(document)


def check_value(name: str, value: Any) -> Any:
    """One setting's value as its type, or a RequestError; text from a command line is converted."""
    fields = plan_fields()
    if name not in fields:
        raise RequestError(f"There is no setting {name!r}." + nearest(name, fields))
    if isinstance(value, str):
        value = from_text(fields[name], value)
    value = checked(fields[name], value)
    if name in BLOCK_BOUNDS:
        check_block_values(name, value)
    return check_subsets(value, fields) if name == "subsets" else value


def _check_key(key: str, section: str, source: str) -> None:
    fields = plan_fields()
    if key not in fields:
        raise RequestError(f"{source}: unknown key {key!r} in [{section}]." + nearest(key, fields))
    right_section = fields[key].metadata["section"]
    if right_section != section:
        raise RequestError(f"{source}: {key} stands in [{section}]; move it to [{right_section}].")


def _sections() -> list[str]:
    return list(dict.fromkeys(setting.metadata["section"] for setting in plan_fields().values()))
