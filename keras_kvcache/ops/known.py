"""Telling a value that is known now from one that a compiler will fill in."""

import keras
import numpy as np


def known_value(value):
    """The value as a NumPy array, or `None` while it is being traced.

    Args:
        value: A Python number, a NumPy array or a backend tensor.

    Returns:
        A NumPy array, or `None` if `value` is symbolic: a tracer of `jax.jit`, a
        tensor of a `tf.function` graph, a torch tensor on the meta device or in
        `torch.compile`, a `KerasTensor`.
    """
    if isinstance(value, (bool, int, float, np.ndarray, np.generic)):
        return np.asarray(value)
    if keras.backend.is_keras_tensor(value):
        return None
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        if isinstance(value, jax.core.Tracer):
            return None
    elif backend == "tensorflow":
        import tensorflow as tf

        if tf.is_symbolic_tensor(value):
            return None
    elif backend == "torch":
        import torch

        if torch.compiler.is_compiling() or value.is_meta:
            return None
    return keras.ops.convert_to_numpy(value)
