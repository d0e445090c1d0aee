"""Key/value caches for Keras 3: fast autoregressive decoding.

Keras asks for TensorFlow unless told otherwise. This package is fast on JAX, so
JAX is the backend if nobody chose one: neither `KERAS_BACKEND` in the
environment nor an `import keras` before this one.
"""

import os as _os
import sys as _sys

from keras_kvcache import interrupt as _interrupt

# Before what takes long to import.
if _interrupt.is_command():
    _interrupt.set_handler(_interrupt.end_process)

if "keras" not in _sys.modules:
    _os.environ.setdefault("KERAS_BACKEND", "jax")

from keras_kvcache import caches, generation, layers, models, samplers
from keras_kvcache.generation import Generator
from keras_kvcache.models import DecoderLM, EncoderDecoderLM
from keras_kvcache.models.accelerate import accelerate
from keras_kvcache.models.hub import from_keras_hub

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
