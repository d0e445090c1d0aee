"""A progress bar for loading."""

from __future__ import annotations

from contextlib import AbstractContextManager

# Seconds after which a bar appears: what is faster needs none.
_DELAY = 1.0
# Seconds between two updates of the bar.
_BETWEEN = 0.1


def progress_bar(description: str, total: int) -> AbstractContextManager:
    """A bar on standard error, if that is a terminal, gone once all is done.

    Args:
        description: What is going on, in two or three words.
        total: How many numbers there are to load.

    Returns:
        A context manager whose `update(count)` moves the bar on.
    """
    from tqdm import tqdm

    return tqdm(
        desc=description,
        total=total,
        unit=" numbers",
        unit_scale=True,
        delay=_DELAY,
        mininterval=_BETWEEN,
        disable=None,
        leave=False,
    )
