"""Where crumb keeps what is not a run: caches, state and settings, by the XDG rules.

Separate so that the wizard and the engine agree on one place each, and tests can move them.
"""

import os
from pathlib import Path

import platformdirs


def cache_dir() -> Path:
    """What can be made again: latents, text embeddings, fingerprints. `CRUMB_CACHE` overrides it."""
    return _private(Path(os.environ.get("CRUMB_CACHE") or platformdirs.user_cache_dir("crumb")))


def state_dir() -> Path:
    """What remembers earlier runs."""
    return _private(Path(platformdirs.user_state_dir("crumb")))


def config_dir() -> Path:
    """What the person has chosen once for all runs."""
    return _private(Path(platformdirs.user_config_dir("crumb")))


def _private(path: Path) -> Path:
    # Captions and pictures may be private, and rented machines have many users.
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path
