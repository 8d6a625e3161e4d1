"""The optimizers that a plan may name, and what they take."""

OPTIMIZERS = ("AdamW8bit", "AdamW", "Prodigy", "DAdaptAdam", "Adafactor", "Lion")
OPTIMIZER_ARGS = {
    "AdamW8bit": ("betas", "eps", "weight_decay"),
    "AdamW": ("betas", "eps", "weight_decay", "amsgrad"),
    "Prodigy": ("betas", "beta3", "eps", "weight_decay", "decouple", "use_bias_correction", "safeguard_warmup", "d0", "d_coef",
                "growth_rate", "slice_p"),
    "DAdaptAdam": ("betas", "eps", "weight_decay", "decouple", "use_bias_correction", "d0", "growth_rate"),
    "Adafactor": ("weight_decay", "clip_threshold", "decay_rate", "beta1", "scale_parameter", "relative_step", "warmup_init"),
    "Lion": ("betas", "weight_decay"),
}
"""What may stand in optimizer_args; AdamW8bit's suit torch's AdamW too, which may have to stand in."""

ADAPTIVE_OPTIMIZERS = ("Prodigy", "DAdaptAdam")
"""Optimizers that find the learning rate themselves: the rate given to them is a factor, 1 (OPT-PRODIGY, OPT-DADAPT)."""
