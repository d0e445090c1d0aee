"""Models from names, files and folders, and back into folders."""

import contextlib
import json
import math
import os
import tempfile
from pathlib import Path

import keras

from keras_kvcache import loaders
from keras_kvcache.models.decoder_config import get_initializer
from keras_kvcache.models.tokenizer_files import (
    load_tokenizer,
    move_tokenizer,
    save_tokenizer,
)
from keras_kvcache.ops import preferred_dtype
from keras_kvcache.quotes import quoted, shortened

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.weights.h5"
# Raised when a folder of this version can't be read by older code.
FORMAT_VERSION = 1
# What a folder is known by: a key that only its writer's config has.
_KINDS_OF_FOLDER = {
    "format_version": "own",
    "registered_name": "keras-hub",
    "model_type": "hugging face",
}


class PresetMethods:
    """Gives `DecoderLM` its `from_preset` and `save_to_preset`."""

    @classmethod
    def from_preset(cls, preset, load_weights=True, **kwargs):
        """Makes a model that was published or saved.

        Args:
            preset: One of

                - a name of this package's, such as `"smollm2_135m_instruct"`,
                  which is fetched once and kept;
                - the path of a GGUF file of a llama-architecture model;
                - the path of a Hugging Face folder: `config.json`, safetensors
                  and perhaps a tokenizer, of the family Llama, Mistral, Mixtral,
                  Qwen 2, 2.5 and 3, Phi-3, GPT-2, OPT, Gemma, Gemma 2 or Gemma 3
                  (text). No code in it is run, and no pickle is read;
                - the path of a folder that `save_to_preset` wrote, this one or
                  keras-hub's;
                - where keras-hub is installed, any other name or handle that
                  `keras_hub.models.CausalLM.from_preset` takes, such as
                  `"gpt2_base_en"`, `"hf://user/model"` or `"kaggle://…"`. keras-hub
                  fetches and loads it, and `from_keras_hub` takes its weights
                  over.
            load_weights: Whether to load weights, or to leave them random.
            **kwargs: Constructor arguments that take the place of the preset's,
                such as `dtype="bfloat16"`. The dtype of a GGUF file or a Hugging
                Face folder is by default bfloat16 on an accelerator and float32
                on a CPU; that of our own folder is that of the model it was saved
                from, and that of a keras-hub model what keras-hub chooses. Of a
                keras-hub model only `dtype`, `max_sequence_length` and
                `tokenizer` can be changed.

        Returns:
            The model, with its tokenizer if there is one. It is of this class; a
            keras-hub model becomes one that shares its layers, so that it can't
            be of a subclass.

        Raises:
            FileNotFoundError: A file is missing.
            ImportError: keras-hub is needed and isn't installed.
            ValueError: The name is unknown, or a file is damaged or of a kind
                that can't be loaded, or an argument can't be honoured; the
                message says why.
            keras_kvcache.loaders.DownloadError: A model can't be fetched.
        """
        path = _find(preset)
        kind = _kind_of(path)
        # They are made of this class, whose module imports this one.
        from keras_kvcache.models.hub import presets as hub_presets

        if kind == "keras-hub":
            return hub_presets.load(cls, str(path or preset), load_weights, kwargs)
        cls = hub_presets.class_with_own_weights(cls)
        if kind == "own":
            return _load_folder(cls, path, load_weights, kwargs)
        if kind == "hugging face":
            checkpoint = loaders.read_hugging_face(
                path, load_weights, load_tokenizer="tokenizer" not in kwargs
            )
        else:
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
            save_tokenizer(self.tokenizer, staging)
            self.save_weights(staging / WEIGHTS_FILE)
            (staging / CONFIG_FILE).write_text(text, encoding="utf-8")
            directory.mkdir(exist_ok=True)
            move_tokenizer(staging, directory)
            for name in (WEIGHTS_FILE, CONFIG_FILE):
                os.replace(staging / name, directory / name)


def is_of_keras_hub(preset):
    """Whether it's keras-hub that loads a preset, or else knows that there is none.

    Args:
        preset: As in `from_preset`.
    """
    return _kind_of(_find(preset)) == "keras-hub"


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
    if isinstance(preset, os.PathLike) or str(preset).startswith((".", "~", os.sep)):
        raise FileNotFoundError(
            f"`preset`, if a path, must be that of a file or folder; {path} is absent."
        )
    return loaders.fetch(preset) if preset in loaders.known_presets() else None


def _kind_of(path):
    """Who wrote what is there: a folder's config tells; `None` is keras-hub's name."""
    if path is None:
        return "keras-hub"
    if not path.is_dir():
        return "gguf"
    config = _read_config(path)
    for key, kind in _KINDS_OF_FOLDER.items():
        if key in config:
            return kind
    raise ValueError(
        f"{path / CONFIG_FILE} must have one of the keys "
        f"{', '.join(_KINDS_OF_FOLDER)}, by which a folder of this package, of "
        f"keras-hub or of Hugging Face is known. Received: {quoted(list(config)[:5])}"
    )


def _read_config(path):
    config_path = path / CONFIG_FILE
    if not config_path.exists():
        raise FileNotFoundError(
            f"`preset`, if a folder, must have a {CONFIG_FILE}; {path} has none."
        )
    return loaders.read_json(config_path)


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


def _load_folder(cls, path, load_weights, kwargs):
    config_path = path / CONFIG_FILE
    if load_weights and not (path / WEIGHTS_FILE).exists():
        raise FileNotFoundError(
            f"`preset`, if a folder, must have a {WEIGHTS_FILE}; {path} has none."
        )
    described = _read_config(path)
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
    tokenizer = None if "tokenizer" in kwargs else load_tokenizer(path)
    dtype = config.get("dtype")
    if isinstance(dtype, dict):
        config["dtype"] = keras.dtype_policies.deserialize(dtype)
    config = {"tokenizer": tokenizer, **config, **kwargs}
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
