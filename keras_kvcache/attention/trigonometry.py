"""Functions that keep float64; those of `keras.ops` return float32 for it."""

from typing import Any

import keras
from keras import ops


def cos(x: Any) -> Any:
    """Cosine of a float tensor, of its dtype."""
    return _elementwise("cos", x)


def sin(x: Any) -> Any:
    """Sine of a float tensor, of its dtype."""
    return _elementwise("sin", x)


def tanh(x: Any) -> Any:
    """Hyperbolic tangent of a float tensor, of its dtype."""
    return _elementwise("tanh", x)


def _elementwise(name, x):
    if keras.backend.standardize_dtype(x.dtype) != "float64":
        return getattr(ops, name)(x)
    backend = keras.backend.backend()
    if backend == "jax":
        import jax.numpy as functions
    elif backend == "tensorflow":
        import tensorflow as functions
    else:
        import torch as functions
    return getattr(functions, name)(x)
