"""Presets that keras-hub fetches and loads."""

import difflib
import os
from pathlib import Path
from typing import Any

from keras_kvcache import loaders
from keras_kvcache.families import keras_hub_families
from keras_kvcache.hub.sharing import make_shared
from keras_kvcache.models.decoder_lm import DecoderLM
from keras_kvcache.models.encoder_decoder_lm import EncoderDecoderLM
from keras_kvcache.models.preset_kinds import loads

INSTALL = '`pip install -e ".[hub]"` in the clone of this package'
# What can be changed of a model that exists already.
OPTIONS = ("dtype", "max_sequence_length", "tokenizer")
# Whose errors are about the way to a model, not about the model.
_FETCHERS = (
    "httpx",
    "httpx2",
    "huggingface_hub",
    "kagglehub",
    "modelscope",
    "requests",
    "tensorflow",
)


@loads("keras-hub")
def load(
    cls: type[DecoderLM],
    preset: str | os.PathLike,
    load_weights: bool,
    options: dict[str, Any],
) -> DecoderLM | EncoderDecoderLM:
    """A model from a name, a handle or a folder of keras-hub's.

    Args:
        cls: `DecoderLM`, or a class derived from it.
        preset: As in `keras_hub.models.CausalLM.from_preset`, or a `Path`.
        load_weights: Whether to load weights, or to leave them random.
        options: Dictionary of arguments of `DecoderLM` to be changed.

    Returns:
        What `from_keras_hub` makes, of this class.

    Raises:
        ImportError: keras-hub isn't installed, or a package that it needs.
        FileNotFoundError: A file is missing.
        ValueError: The preset is unknown, not of a family that can be decoded
            here or damaged, or an option can't be changed.
        keras_kvcache.loaders.DownloadError: The preset can't be fetched.
    """
    preset = str(preset)
    hub = _import_keras_hub(preset)
    if "://" not in preset and not _is_folder(preset):
        _check_name(hub, preset)
    _check_options(options)
    arguments = {"load_weights": load_weights}
    if options.get("dtype") is not None:
        arguments["dtype"] = options["dtype"]
    if "tokenizer" in options:
        arguments["preprocessor"] = None
    causal_lm = _load(hub, preset, arguments)
    model = make_shared(cls, causal_lm, options.get("max_sequence_length"))
    if "tokenizer" in options:
        model.tokenizer = options["tokenizer"]
    return model


def _is_folder(preset):
    return Path(preset).exists()


def _import_keras_hub(preset):
    try:
        import keras_hub
    except ImportError as error:
        if error.name not in ("keras_hub", None):
            raise
        if "://" in preset or _is_folder(preset):
            raise ImportError(
                f"`preset` is one that keras-hub loads: {preset!r}. keras-hub must be "
                f"installed for it: {INSTALL}"
            ) from error
        raise ValueError(
            f"{_what_is_known()}. Names of keras-hub's presets, such as "
            f"'gpt2_base_en', are known where it is installed: {INSTALL}. Received: "
            f"{preset!r}"
        ) from error
    return keras_hub


def _what_is_known():
    return (
        f"`preset` must be one of {', '.join(loaders.known_presets())}, the path of a "
        ".gguf file, or that of a folder of this package, of keras-hub or of Hugging "
        "Face"
    )


def _check_name(hub, preset):
    """Refuses a name before anything is downloaded."""
    names = hub.models.CausalLM.presets
    if preset not in names:
        close = difflib.get_close_matches(preset, [*loaders.known_presets(), *names])
        hint = f"; is it {' or '.join(map(repr, close))}?" if close else ""
        if "/" in preset:
            hint = f"; for a repository of the Hugging Face Hub, say 'hf://{preset}'"
        raise ValueError(
            f"{_what_is_known()}, or one of keras-hub's {len(names)} names in "
            f"`keras_hub.models.CausalLM.presets`. Received: {preset!r}{hint}"
        )
    decoders = [n for n, one in keras_hub_families().items() if not one.has_encoder]
    known = (getattr(hub.models, name, None) for name in decoders)
    if not any(preset in backbone.presets for backbone in known if backbone):
        raise ValueError(
            f"`preset` must be of one of the families {', '.join(decoders)}. Received: "
            f"{preset!r}, which isn't"
        )


def _check_options(options):
    refused = [name for name in options if name not in OPTIONS]
    if refused:
        raise ValueError(
            f"Of a keras-hub model only {', '.join(OPTIONS)} can be changed. Received: "
            f"{', '.join(refused)}"
        )


def _load(hub, preset, arguments):
    """keras-hub's own loading, with errors that say what was to be loaded."""
    try:
        return hub.models.CausalLM.from_preset(preset, **arguments)
    except (ValueError, FileNotFoundError) as error:
        kind = ValueError if isinstance(error, ValueError) else FileNotFoundError
        # A repository that can't be reached looks to keras-hub like one without files.
        network = " Is there a way to it through the network?" * ("://" in preset)
        raise kind(f"keras-hub can't load {preset!r}: {error}{network}") from error
    except Exception as error:
        fetcher = type(error).__module__.partition(".")[0]
        if not isinstance(error, OSError) and fetcher not in _FETCHERS:
            raise
        if _is_folder(preset):
            raise ValueError(f"keras-hub can't load {preset!r}: {error}") from error
        raise loaders.DownloadError(
            f"keras-hub can't fetch {preset!r}: {error}"
        ) from error
