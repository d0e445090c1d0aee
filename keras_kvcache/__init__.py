"""Key/value caches for Keras 3: fast autoregressive decoding.

Keras asks for TensorFlow unless told otherwise. This package is fast on JAX, so
JAX is the backend if nobody chose one: neither `KERAS_BACKEND` in the
environment nor an `import keras` before this one.

Importing the package imports neither Keras nor JAX, unless Keras is there already. They
are imported when the package is first used, or by the first `import keras`.
"""

import importlib as _importlib
import os as _os
import sys as _sys
from typing import TYPE_CHECKING as _TYPE_CHECKING

from keras_kvcache.registration import register_with_keras as _register_with_keras

if "keras" not in _sys.modules:
    _os.environ.setdefault("KERAS_BACKEND", "jax")

if _TYPE_CHECKING:
    from keras_kvcache import caches, generation, layers, models, samplers
    from keras_kvcache.generation import Generator
    from keras_kvcache.hub import from_keras_hub
    from keras_kvcache.hub.accelerate import accelerate
    from keras_kvcache.models import DecoderLM, EncoderDecoderLM

__version__ = "0.1.0"

__all__ = [
    "DecoderLM",
    "EncoderDecoderLM",
    "Generator",
    "accelerate",
    "caches",
    "from_keras_hub",
    "generation",
    "layers",
    "models",
    "samplers",
]

# Imported when first used: subpackages, and names by the module that they come from.
_FOLDERS = (
    "attention",
    "caches",
    "generation",
    "hub",
    "layers",
    "loaders",
    "models",
    "runtime",
    "samplers",
    "tokenizers",
)
_HOMES = {
    "DecoderLM": "models",
    "EncoderDecoderLM": "models",
    "Generator": "generation",
    "accelerate": "hub.accelerate",
    "from_keras_hub": "hub",
}


def __getattr__(name):
    if name in _FOLDERS:
        return _importlib.import_module(f"keras_kvcache.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'keras_kvcache' has no attribute {name!r}")
    module = _importlib.import_module(f"keras_kvcache.{_HOMES[name]}")
    value = globals()[name] = getattr(module, name)
    return value


def __dir__():
    return sorted({*globals(), *_FOLDERS, *_HOMES})


_register_with_keras(_FOLDERS)
