"""The folder that keeps downloaded models and compiled programs."""

from __future__ import annotations

import errno
import os
from pathlib import Path

HOW_TO_MOVE = "The environment variable KERAS_KVCACHE_HOME names another folder."
_FULL = (errno.ENOSPC, errno.EDQUOT)
_UNUSABLE = (
    *(errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENOTDIR, errno.EEXIST),  # A file is where a folder should be.
)


def cache_folder() -> Path:
    """The folder of downloads and compiled programs, which may not exist yet.

    It is the environment variable `KERAS_KVCACHE_HOME` if that is set, else
    `keras-kvcache` in `XDG_CACHE_HOME`, else `~/.cache/keras-kvcache`.
    """
    own = os.environ.get("KERAS_KVCACHE_HOME")
    if own:
        return Path(own).expanduser().absolute()
    shared = os.environ.get("XDG_CACHE_HOME")
    base = Path(shared).expanduser() if shared else Path.home() / ".cache"
    return base / "keras-kvcache"


def explain(error: OSError) -> str | None:
    """Why nothing can be kept in the folder, and how to have another.

    Args:
        error: The error that writing there raised.

    Returns:
        Two sentences, or `None` if the error is about something else.
    """
    if error.errno in _FULL:
        what = "has no space left"
    elif error.errno in _UNUSABLE:
        what = "can't be written to"
    else:
        return None
    return f"{cache_folder()} {what} ({os.strerror(error.errno)}). {HOW_TO_MOVE}"
