"""The optimizers that a plan may name, and what they take."""

OPTIMIZERS = ("AdamW8bit", "AdamW", "Prodigy", "Prodigy8bit", "DAdaptAdam", "Adafactor", "Lion")
_PRODIGY = ("betas", "beta3", "eps", "weight_decay", "decouple", "use_bias_correction", "safeguard_warmup", "d0", "d_coef",
            "growth_rate", "slice_p")
OPTIMIZER_ARGS = {
    "AdamW8bit": ("betas", "eps", "weight_decay"),
    "AdamW": ("betas", "eps", "weight_decay", "amsgrad"),
    "Prodigy": _PRODIGY,
    "Prodigy8bit": _PRODIGY,
    "DAdaptAdam": ("betas", "eps", "weight_decay", "decouple", "use_bias_correction", "d0", "growth_rate"),
    "Adafactor": ("weight_decay", "clip_threshold", "decay_rate", "beta1", "scale_parameter", "relative_step", "warmup_init"),
    "Lion": ("betas", "weight_decay"),
}
"""What may stand in optimizer_args."""

ADAPTIVE_OPTIMIZERS = ("Prodigy", "Prodigy8bit", "DAdaptAdam")
"""Optimizers that find the learning rate themselves: the rate given to them is a factor, 1 (OPT-PRODIGY, OPT-DADAPT)."""
