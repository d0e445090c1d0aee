"""Integer checks, and concrete values versus traced ones."""

import numbers
import sys
from collections.abc import Callable
from typing import Any

import keras
import numpy as np


def is_integer(value: Any) -> bool:
    """Whether a value is an integer of Python or NumPy, and no boolean."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def concrete_value(value: Any) -> np.ndarray | None:
    """The value as a NumPy array, or `None` while it is being traced.

    Args:
        value: A Python number, a NumPy array or a backend tensor.

    Returns:
        A NumPy array, or `None` if `value` is symbolic: a tracer of `jax.jit`, a
        tensor of a `tf.function` graph, a torch tensor on the meta device, in
        `torch.compile` or where `trace` records, a `KerasTensor`.
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

        if torch.compiler.is_compiling() or value.is_meta or is_recorded():
            return None
    return keras.ops.convert_to_numpy(value)


def either(
    predicate: Any, then: Callable[[], Any], otherwise: Callable[[], Any]
) -> Any:
    """Computes `then()` if a predicate holds, else `otherwise()`.

    Args:
        predicate: A bool, or a boolean tensor that may be traced.
        then, otherwise: Functions without arguments; both return a tensor, or both a
            tuple of tensors, of the same shapes and dtypes.
    """
    known = concrete_value(predicate)
    if known is None:
        return keras.ops.cond(predicate, then, otherwise)
    return then() if known else otherwise()


def is_recorded() -> bool:
    """Whether PyTorch records operations, as in `trace`: one path for all values."""
    proxies = sys.modules.get("torch.fx.experimental.proxy_tensor")
    return proxies is not None and proxies.get_proxy_mode() is not None


def concrete_integers(
    name: str, value: Any, rows: int | None = None
) -> np.ndarray | None:
    """Reads an argument of one integer, or of one for each row.

    Args:
        name: Of the argument.
        value: An int, an array or a tensor `()`, or a list or the like `(rows,)`.
        rows: How many rows; `None` for one integer only.

    Returns:
        A NumPy array `()` or `(rows,)`, or `None` while it is being traced.

    Raises:
        ValueError: The value is something else.
    """
    shapes = [()] if rows is None else [(), (rows,)]
    try:
        array = value if keras.ops.is_tensor(value) else np.asarray(value)
    except ValueError:  # by lists of unequal lengths
        array = np.asarray(None)
    if "int" not in str(array.dtype) or tuple(array.shape) not in shapes:
        each = "" if rows is None else f", or one for each of {rows} rows"
        raise ValueError(f"`{name}` must be an integer{each}. Received: {value!r}")
    return concrete_value(array)
