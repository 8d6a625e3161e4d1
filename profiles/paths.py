"""Where crumb keeps what is not a run: caches and state, by the XDG rules.

Separate so that the wizard and the engine agree on one place each, and tests can move them.
"""

import os
from pathlib import Path

import platformdirs

from crumb.profiles.errors import RequestError


def cache_dir() -> Path:
    """What can be made again: latents, text embeddings, fingerprints. `CRUMB_CACHE` overrides it."""
    return _private(Path(os.environ.get("CRUMB_CACHE") or platformdirs.user_cache_dir("crumb")))


def state_dir() -> Path:
    """What remembers earlier runs."""
    return _private(Path(platformdirs.user_state_dir("crumb")))


def _private(path: Path) -> Path:
    # Captions and pictures may be private, and rented machines have many users.
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"The folder {path} can't be made ({error.strerror}). Point CRUMB_CACHE and XDG_STATE_HOME to "
                           f"folders you can write to.") from None
    return path
