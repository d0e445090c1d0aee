"""Files that appear whole or not at all, also if the process or the power fails.

A file is written beside its place, flushed to the disk and then renamed, which replaces
an earlier file in one step. Files get the permissions that the process gives new ones.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Context in which a file is written that then replaces the one at `path`.

    Args:
        path: The file; its folder is made if need be.

    Yields:
        Where to write it: a path of the same name in a folder that is removed at the
        end. After an error `path` is as it was.

    Raises:
        OSError: The file can't be written or moved.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with staging_folder(path) as folder:
        yield folder / path.name
        replace(folder / path.name, path)


@contextlib.contextmanager
def staging_folder(path: Path) -> Iterator[Path]:
    """Context with a temporary folder beside `path`, on the same file system."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as made:
        yield Path(made)


def replace(source: Path, target: Path) -> None:
    """Moves a file or folder; its bytes are on the disk before its name is.

    Args:
        source: What is moved, on the file system of `target`.
        target: Where to; a file there is replaced.
    """
    for path in [source, *source.rglob("*")] if source.is_dir() else [source]:
        _flush(path)
    os.replace(source, target)
    _flush(target.parent)


def _flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    is_posix = os.name == "posix"
    if path.is_dir() and not is_posix:  # Windows opens no folders.
        return
    # Windows flushes only what may be written, others also what may only be read.
    descriptor = os.open(path, os.O_RDONLY if is_posix else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
