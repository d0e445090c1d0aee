"""Functions that keep float64; on JAX, those of `keras.ops` return float32 for it."""

from typing import Any

import jax
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
    is_float64 = keras.backend.standardize_dtype(x.dtype) == "float64"
    is_jax = keras.backend.backend() == "jax"
    return getattr(jax.numpy if is_float64 and is_jax else ops, name)(x)
