"""Which kind a preset is of, and who loads that kind."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from keras_kvcache import loaders
from keras_kvcache.errors import quoted

CONFIG_FILE = "config.json"
# What a folder is known by: a key that only its writer's config has.
_KINDS_OF_FOLDER = {
    "format_version": "own",
    "registered_name": "keras-hub",
    "model_type": "hugging face",
}
# By kind: `(class, path or name, load_weights, arguments of the class) -> model`.
LOADERS: dict[str, Callable] = {}


def loads(kind: str) -> Callable:
    """Decorates the function that loads presets of a kind."""

    def register(function):
        LOADERS[kind] = function
        return function

    return register


def load_preset(
    cls: type, preset: str | os.PathLike, load_weights: bool, options: Any
) -> Any:
    """Makes a model as `DecoderLM.from_preset` says.

    Args:
        cls: Class of the model.
        preset: Name or path.
        load_weights: Whether to load weights, or to leave them random.
        options: Dictionary of constructor arguments that take the place of the
            preset's.
    """
    path = find_preset(preset)
    return LOADERS[kind_of(path)](cls, path or preset, load_weights, options)


def is_of_keras_hub(preset: str | os.PathLike) -> bool:
    """Whether it's keras-hub that loads a preset, or else knows that there is none."""
    return kind_of(find_preset(preset)) == "keras-hub"


def find_preset(preset: str | os.PathLike) -> Path | None:
    """Where a preset lies, once it's fetched; `None` for a name that isn't ours.

    Raises:
        TypeError: It's neither a name nor a path.
        FileNotFoundError: It's a path, and nothing is there.
    """
    if not isinstance(preset, (str, os.PathLike)):
        raise TypeError(
            f"`preset` must be a name or a path. Received: {type(preset).__name__}"
        )
    path = Path(preset).expanduser()
    if path.exists() or path.suffix == ".gguf":
        return path
    if isinstance(preset, os.PathLike) or str(preset).startswith((".", "~", os.sep)):
        raise FileNotFoundError(
            f"`preset`, if a path, must be that of a file or folder; {path} is absent."
        )
    return loaders.fetch(preset) if preset in loaders.known_presets() else None


def kind_of(path: Path | None) -> str:
    """Who wrote what is there: a folder's config tells; `None` is keras-hub's name.

    Raises:
        FileNotFoundError: A folder has no config.
        ValueError: Its config is nobody's.
    """
    if path is None:
        return "keras-hub"
    if not path.is_dir():
        return "gguf"
    config = read_config(path)
    for key, kind in _KINDS_OF_FOLDER.items():
        if key in config:
            return kind
    raise ValueError(
        f"{path / CONFIG_FILE} must have one of the keys "
        f"{', '.join(_KINDS_OF_FOLDER)}, by which a folder of this package, of "
        f"keras-hub or of Hugging Face is known. Received: {quoted(list(config)[:5])}"
    )


def read_config(folder: Path) -> dict:
    """Reads a folder's `config.json`.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It's damaged.
    """
    path = folder / CONFIG_FILE
    if not path.exists():
        raise FileNotFoundError(
            f"`preset`, if a folder, must have a {CONFIG_FILE}; {folder} has none."
        )
    return loaders.read_json(path)
