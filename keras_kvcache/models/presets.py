"""Models from names, files and folders, and back into folders."""

import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any

import keras

from keras_kvcache import loaders
from keras_kvcache.errors import quoted, shortened
from keras_kvcache.layers.initializers import get_initializer
from keras_kvcache.models.preset_kinds import CONFIG_FILE, loads, read_config
from keras_kvcache.models.tokenizer_files import (
    load_tokenizer,
    move_tokenizer,
    save_tokenizer,
)
from keras_kvcache.runtime import atomic
from keras_kvcache.runtime.platform import preferred_dtype

WEIGHTS_FILE = "model.weights.h5"
# Raised when a folder of this version can't be read by older code.
FORMAT_VERSION = 1


@loads("gguf")
def load_gguf(cls: type, path: Path, load_weights: bool, options: Any) -> Any:
    """Makes a model of a GGUF file; arguments as of `load_preset`."""
    return _load_checkpoint(cls, loaders.read_gguf(path), load_weights, options)


@loads("hugging face")
def load_hugging_face(cls: type, path: Path, load_weights: bool, options: Any) -> Any:
    """Makes a model of a Hugging Face folder; arguments as of `load_preset`."""
    checkpoint = loaders.read_hugging_face(
        path, load_weights, load_tokenizer="tokenizer" not in options
    )
    return _load_checkpoint(cls, checkpoint, load_weights, options)


def _load_checkpoint(cls, checkpoint, load_weights, options):
    config = {"dtype": preferred_dtype(), "tokenizer": checkpoint.tokenizer}
    config |= {**checkpoint.config, **options}
    model = _construct(cls, config, load_weights)
    if load_weights:
        assign_weights(model, checkpoint.weights)
    return model


def save_preset(model: Any, directory: str | os.PathLike) -> None:
    """Writes a model as `DecoderLM.save_to_preset` says.

    Args:
        model: A model that `load_folder` can make again, with weights of its own.
        directory: The folder.
    """
    directory = Path(directory)
    config = model.get_config()
    config.pop("name", None)
    described = {"format_version": FORMAT_VERSION, "config": config}
    text = json.dumps(described, indent=2)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with atomic.staging_folder(directory) as staging:
        save_tokenizer(model.tokenizer, staging)
        model.save_weights(staging / WEIGHTS_FILE)
        (staging / CONFIG_FILE).write_text(text, encoding="utf-8")
        directory.mkdir(exist_ok=True)
        move_tokenizer(staging, directory)
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            atomic.replace(staging / name, directory / name)


def assign_weights(model: Any, weights: Any) -> None:
    """Gives every weight of a model its value.

    Args:
        model: A built model.
        weights: Mapping from the names of its weights, such as
            `"block_0/attention/query/kernel"`, to functions that give an array.

    Raises:
        ValueError: A weight is missing or left over, or has another shape.
    """
    variables = {weight_name(variable): variable for variable in model.weights}
    missing, extra = (
        variables.keys() - weights.keys(),
        weights.keys() - variables.keys(),
    )
    if missing or extra:
        raise ValueError(
            "The checkpoint must have the model's weights. "
            f"Missing: {sorted(missing)[:5]}; unknown: {sorted(extra)[:5]}"
        )
    sizes = {name: math.prod(variable.shape) for name, variable in variables.items()}
    with loaders.progress_bar("Loading weights", sum(sizes.values())) as bar:
        for name, variable in variables.items():
            value = weights[name]()
            if tuple(value.shape) != tuple(variable.shape):
                raise ValueError(
                    f"The weight {quoted(name)} must have the shape "
                    f"{tuple(variable.shape)}. Received: {tuple(value.shape)}"
                )
            variable.assign(value)
            bar.update(sizes[name])


def weight_name(variable: Any) -> str:
    """The variable's path without the model's own name."""
    return variable.path.split("/", 1)[1]


def _construct(cls, config, load_weights):
    """Makes the model; weights that are about to be loaded need no random start."""
    if not load_weights:
        return cls(**config)
    model = cls(**{**config, "kernel_initializer": "zeros"})
    model.kernel_initializer = get_initializer(config.get("kernel_initializer"))
    return model


@contextlib.contextmanager
def _bar_of_blocks(model):
    """A progress bar that moves on whenever Keras has loaded a block's weights."""
    with loaders.progress_bar("Loading weights", model.count_params()) as bar:

        def counted(block):
            load = block.load_own_variables

            def load_and_count(store):
                load(store)
                bar.update(block.count_params())

            return load_and_count

        for block in model.blocks:
            block.load_own_variables = counted(block)
        try:
            yield
        finally:
            for block in model.blocks:
                del block.load_own_variables


@loads("own")
def load_folder(cls: type, path: Path, load_weights: bool, options: Any) -> Any:
    """Makes a model of a folder that `save_preset` wrote; arguments as there."""
    config_path = path / CONFIG_FILE
    if load_weights and not (path / WEIGHTS_FILE).exists():
        raise FileNotFoundError(
            f"`preset`, if a folder, must have a {WEIGHTS_FILE}; {path} has none."
        )
    described = read_config(path)
    try:
        version, config = described["format_version"], dict(described["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{config_path} must be JSON that `save_to_preset` wrote: {quoted(error)}"
        ) from error
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{config_path} must be of format version {FORMAT_VERSION}. "
            f"Received: {quoted(version)}"
        )
    tokenizer = None if "tokenizer" in options else load_tokenizer(path)
    dtype = config.get("dtype")
    if isinstance(dtype, dict):
        config["dtype"] = keras.dtype_policies.deserialize(dtype)
    config = {"tokenizer": tokenizer, **config, **options}
    try:
        model = _construct(cls, config, load_weights)
    except TypeError as error:
        raise ValueError(
            f"{config_path} must have the constructor arguments of "
            f"{cls.__name__}: {shortened(error, 500)}"
        ) from error
    if load_weights:
        try:
            with _bar_of_blocks(model):
                model.load_weights(path / WEIGHTS_FILE)
        except (OSError, KeyError, ValueError) as error:
            raise ValueError(
                f"{path / WEIGHTS_FILE} must hold the model's weights: "
                f"{shortened(error, 500)}"
            ) from error
    return model
