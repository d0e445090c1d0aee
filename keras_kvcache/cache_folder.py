"""Where models that were downloaded and what was compiled are kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """The folder of all that is kept from run to run, which may not exist yet.

    It is the environment variable `KERAS_KVCACHE_HOME` if that is set, else
    `keras-kvcache` in `XDG_CACHE_HOME`, else `~/.cache/keras-kvcache`.
    """
    own = os.environ.get("KERAS_KVCACHE_HOME")
    if own:
        return Path(own).expanduser().absolute()
    shared = os.environ.get("XDG_CACHE_HOME")
    base = Path(shared).expanduser() if shared else Path.home() / ".cache"
    return base / "keras-kvcache"
