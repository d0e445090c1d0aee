"""Tokenizers in the files, pickles and copies of their models."""

import contextvars
import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras

from keras_kvcache import loaders, tokenizers
from keras_kvcache.errors import quoted, shortened
from keras_kvcache.runtime import atomic

# Here, as loaders know nothing of Keras.
keras.saving.register_keras_serializable("keras_kvcache")(tokenizers.UnreadTokenizer)

# A tokenizer that Keras can write as an object: its config, and a folder of its files.
OBJECT_FILE, OBJECT_FOLDER = "tokenizer_object.json", "tokenizer_object"
# All that `save_tokenizer` may write.
TOKENIZER_FILES = (*tokenizers.TOKENIZER_FILES, OBJECT_FILE, OBJECT_FOLDER)
# Set while a model is pickled: its tokenizer goes beside the model's file, not into it.
_goes_beside = contextvars.ContextVar("goes_beside", default=False)


def reduce_beside(reduce: Callable, tokenizer: Any) -> tuple:
    """Reduces a model for pickling, with its tokenizer beside Keras' file.

    Args:
        reduce: Keras' own `__reduce__` of the model, without arguments.
        tokenizer: The model's, or `None`; it's pickled as any object is.
    """
    token = _goes_beside.set(True)
    try:
        load, arguments = reduce()
    finally:
        _goes_beside.reset(token)
    return _unpickle, (load, arguments, tokenizer)


def _unpickle(load, arguments, tokenizer):
    model = load(*arguments)
    if tokenizer is not None:
        model.tokenizer = tokenizer
    return model


def save_unless_beside(tokenizer: Any, directory: str | os.PathLike) -> None:
    """As `save_tokenizer`; nothing while a model is pickled by `reduce_beside`."""
    if not _goes_beside.get():
        save_tokenizer(tokenizer, directory)


def save_tokenizer(tokenizer: Any, directory: str | os.PathLike) -> None:
    """Writes a tokenizer into a folder, or warns that it can't be saved.

    It's written if it is one of this package, or of a class that is registered by
    `keras.saving.register_keras_serializable` and has `get_config` and `from_config`;
    it may have `save_assets(directory)` and `load_assets(directory)`. For any other a
    warning is enough: an error would lose the weights that are to be saved.

    Args:
        tokenizer: The tokenizer, or `None` to write nothing.
        directory: Path of an existing folder.
    """
    if tokenizer is None:
        return
    directory, kind = Path(directory), type(tokenizer)
    if is_keras_object(tokenizer):
        described = keras.saving.serialize_keras_object(tokenizer)
        text = json.dumps(described, indent=2)
        if hasattr(tokenizer, "save_assets"):
            (directory / OBJECT_FOLDER).mkdir(exist_ok=True)
            tokenizer.save_assets(str(directory / OBJECT_FOLDER))
        (directory / OBJECT_FILE).write_text(text, encoding="utf-8")
    elif isinstance(tokenizer, tokenizers.Tokenizer):
        tokenizer.save(directory)
    else:
        warnings.warn(
            f"The tokenizer, a {kind.__module__}.{kind.__qualname__}, isn't saved with "
            "the model: set the loaded model's `tokenizer` again. To be saved, its "
            "class must have `get_config` and `from_config` and be registered by "
            "`keras.saving.register_keras_serializable`.",
            stacklevel=3,
        )


def load_tokenizer(directory: str | os.PathLike) -> Any:
    """The tokenizer that `save_tokenizer` wrote into a folder, or `None`.

    Raises:
        ValueError: A file is damaged.
    """
    directory = Path(directory)
    if (directory / tokenizers.TOKENIZER_FILES[0]).exists():
        return tokenizers.Tokenizer.load(directory)
    if not (directory / OBJECT_FILE).exists():
        return None
    described = loaders.read_json(directory / OBJECT_FILE)
    try:
        tokenizer = keras.saving.deserialize_keras_object(described)
    except TypeError as error:
        warnings.warn(
            "The model's tokenizer isn't loaded; the module of its class must be "
            f"imported before. Received: {quoted(described.get('registered_name'))}, "
            f"{shortened(error, 300)}",
            stacklevel=3,
        )
        return None
    if (directory / OBJECT_FOLDER).exists():
        tokenizer.load_assets(str(directory / OBJECT_FOLDER))
    return tokenizer


def move_tokenizer(source: Any, directory: str | os.PathLike) -> None:
    """Moves a tokenizer from one folder to another and replaces the one there."""
    for name in TOKENIZER_FILES:
        new, old = source / name, directory / name
        if old.is_dir():
            shutil.rmtree(old)
        if new.exists():
            atomic.replace(new, old)
        else:
            old.unlink(missing_ok=True)


def is_keras_object(thing: Any) -> bool:
    """Whether Keras can write an object's config and find its class again."""
    is_registered = ">" in keras.saving.get_registered_name(type(thing))
    has_config = hasattr(thing, "get_config") and hasattr(thing, "from_config")
    return is_registered and has_config
