"""Optional packages that are installed but broken are put out of sight before anything else meets them.

diffusers imports bitsandbytes as soon as it is installed, and bitsandbytes imports Triton: a wheel that does not
fit the driver would stop the whole engine, although the job can be done without it.
"""

import importlib
import importlib.util
import logging
import sys
from collections.abc import Callable

OPTIONAL = {
    "triton": "plain torch does its work",
    "bitsandbytes": "nothing: crumb's 8-bit optimizers are its own",
    "xformers": "attention is torch's own",
}
"""In the order in which they import each other."""

TRIED = {"xformers": "xformers.ops"}
"""What diffusers imports of a package, where that is more than its top."""


def hide_broken_packages(warn: Callable[[str], None]) -> None:
    """Imports each; one that fails is treated as not installed from here on, with a sentence to `warn`."""
    # It announces on every start that an inference-only CPU kernel can't be fetched from the hub.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for name, consequence in OPTIONAL.items():
        if importlib.util.find_spec(name) is None:
            continue
        try:
            importlib.import_module(TRIED.get(name, name))
        except Exception as error:  # a broken wheel raises anything
            for module in [module for module in sys.modules if module == name or module.startswith(f"{name}.")]:
                del sys.modules[module]
            sys.modules[name] = None
            warn(f"{name} is installed but broken ({type(error).__name__}: {error}): {consequence}. "
                 f"`crumb doctor` shows more.")
