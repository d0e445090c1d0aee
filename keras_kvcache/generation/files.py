"""Rows in files: an answer goes on in another process."""

import os
from dataclasses import fields
from typing import Any

from keras_kvcache.caches.files import read_tree, write_tree
from keras_kvcache.generation.rows import Rows

# What the files say that they hold.
HOLDS = "rows"


def save_rows(path: str | os.PathLike, rows: Rows, model: Any = None) -> None:
    """Writes rows into one file, in the format of `keras_kvcache.caches.save_caches`.

    Args:
        path: The file; its folder is made if need be.
        rows: `Rows`. The state of their sampler may be tuples, lists and dictionaries
            of arrays.
        model: The `keras.Model` that the rows are of, or `None`. With it the file gets
            a fingerprint by which `load_rows` tells that model from others.

    Raises:
        TypeError: `rows` or `model` is something else, or the cache isn't of this
            package.
        ValueError: The model isn't built.
        OSError: The file can't be written.
    """
    if not isinstance(rows, Rows):
        raise TypeError(f"`rows` must be `Rows`. Received: {type(rows).__name__}")
    tree = {field.name: getattr(rows, field.name) for field in fields(Rows)}
    write_tree(path, tree, model, HOLDS)


def load_rows(path: str | os.PathLike, model: Any = None) -> Rows:
    """Reads rows from a file.

    Args:
        path: What `save_rows` wrote.
        model: The `keras.Model` that is to go on with them: a file that was saved with
            another one, or with none, is refused. With `None` any file is taken.

    Returns:
        `Rows`, which go on with exactly the tokens that they would have had.

    Raises:
        FileNotFoundError: There is no such file.
        TypeError: `model` is no `keras.Model`.
        ValueError: The file isn't one of rows, is of another version or of another
            model, or is damaged.
    """
    tree, _ = read_tree(path, model, HOLDS)
    names = {field.name for field in fields(Rows)}
    if not isinstance(tree, dict) or set(tree) != names:
        raise ValueError(
            f"{path} must be a file that `save_rows` wrote. Received: {tree!r}"
        )
    return Rows(**tree)
