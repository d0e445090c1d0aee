"""Models from names, files and folders, and back into folders."""

import json
import os
import tempfile
from pathlib import Path

import keras

from keras_kvcache import loaders
from keras_kvcache.models.decoder_config import get_initializer
from keras_kvcache.ops import preferred_dtype

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.weights.h5"
PRESET_FILES = (*loaders.TOKENIZER_FILES, WEIGHTS_FILE, CONFIG_FILE)
# Raised when a folder of this version can't be read by older code.
FORMAT_VERSION = 1


class PresetMethods:
    """Gives `DecoderLM` its `from_preset` and `save_to_preset`."""

    @classmethod
    def from_preset(cls, preset, load_weights=True, **kwargs):
        """Makes a model that was published or saved.

        Args:
            preset: A name, such as `"smollm2_135m_instruct"`, which is fetched
                once and kept; the path of a GGUF file of a llama-architecture
                model; or a folder that `save_to_preset` wrote.
            load_weights: Whether to load weights, or to leave them random.
            **kwargs: Constructor arguments that take the place of the preset's,
                such as `dtype="bfloat16"`. A GGUF file's dtype is by default
                bfloat16 on an accelerator and float32 on a CPU; a folder's is
                that of the model it was saved from.

        Returns:
            The model, with its tokenizer.

        Raises:
            FileNotFoundError: A file is missing.
            ValueError: The name is unknown, or a file is damaged or of a kind
                that can't be loaded; the message says why.
        """
        path = _find(preset)
        if path.is_dir():
            return _load_folder(cls, path, load_weights, kwargs)
        checkpoint = loaders.read_gguf(path)
        config = {"dtype": preferred_dtype(), "tokenizer": checkpoint.tokenizer}
        config |= {**checkpoint.config, **kwargs}
        model = _construct(cls, config, load_weights)
        if load_weights:
            assign_weights(model, checkpoint.weights)
        return model

    def save_to_preset(self, directory):
        """Writes config, weights and tokenizer into a folder.

        Everything is written beside the folder first and moved there when it is
        complete, so that an error leaves an earlier preset as it was.

        Args:
            directory: The folder; made if need be. An earlier preset in it is
                replaced.

        Raises:
            TypeError: The config holds something that JSON can't.
        """
        directory = Path(directory)
        config = self.get_config()
        config.pop("name", None)
        described = {"format_version": FORMAT_VERSION, "config": config}
        text = json.dumps(described, indent=2)
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            dir=directory.parent, prefix=f".{directory.name}."
        ) as staging:
            staging = Path(staging)
            if self.tokenizer is not None:
                self.tokenizer.save(staging)
            self.save_weights(staging / WEIGHTS_FILE)
            (staging / CONFIG_FILE).write_text(text, encoding="utf-8")
            directory.mkdir(exist_ok=True)
            for name in PRESET_FILES:
                if (staging / name).exists():
                    os.replace(staging / name, directory / name)
                else:
                    (directory / name).unlink(missing_ok=True)


def assign_weights(model, weights):
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
    for name, variable in variables.items():
        value = weights[name]()
        if tuple(value.shape) != tuple(variable.shape):
            raise ValueError(
                f"The weight {name!r} must have the shape {tuple(variable.shape)}. "
                f"Received: {tuple(value.shape)}"
            )
        variable.assign(value)


def weight_name(variable):
    """The variable's path without the model's own name."""
    return variable.path.split("/", 1)[1]


def _find(preset):
    if not isinstance(preset, (str, os.PathLike)):
        raise TypeError(
            f"`preset` must be a name or a path. Received: {type(preset).__name__}"
        )
    path = Path(preset).expanduser()
    if path.exists() or path.suffix == ".gguf":
        return path
    return loaders.fetch(str(preset))


def _construct(cls, config, load_weights):
    """Makes the model; weights that are about to be loaded need no random start."""
    if not load_weights:
        return cls(**config)
    model = cls(**{**config, "kernel_initializer": "zeros"})
    model.kernel_initializer = get_initializer(config.get("kernel_initializer"))
    return model


def _load_folder(cls, path, load_weights, kwargs):
    config_path = path / CONFIG_FILE
    for name in (CONFIG_FILE, *([WEIGHTS_FILE] if load_weights else [])):
        if not (path / name).exists():
            raise FileNotFoundError(
                f"`preset`, if a folder, must have a {name}; {path} has none."
            )
    try:
        described = json.loads(config_path.read_text(encoding="utf-8"))
        version, config = described["format_version"], dict(described["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{config_path} must be JSON that `save_to_preset` wrote: {error!r}"
        ) from error
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{config_path} must be of format version {FORMAT_VERSION}. "
            f"Received: {version!r}"
        )
    tokenizer = None
    if (path / loaders.TOKENIZER_FILES[0]).exists():
        tokenizer = loaders.Tokenizer.load(path)
    dtype = config.get("dtype")
    if isinstance(dtype, dict):
        config["dtype"] = keras.dtype_policies.deserialize(dtype)
    config = {"tokenizer": tokenizer, **config, **kwargs}
    try:
        model = _construct(cls, config, load_weights)
    except TypeError as error:
        raise ValueError(
            f"{config_path} must have the constructor arguments of "
            f"{cls.__name__}: {error}"
        ) from error
    if load_weights:
        try:
            model.load_weights(path / WEIGHTS_FILE)
        except (OSError, KeyError, ValueError) as error:
            raise ValueError(
                f"{path / WEIGHTS_FILE} must hold the model's weights: {error}"
            ) from error
    return model
