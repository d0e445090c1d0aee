"""Positions of tokens: the update index and what follows from it."""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_kvcache.runtime.concrete import concrete_value, is_integer

# Past the end of any cache, and far enough from int32's end to add `T` to it. It's also
# the `end` of rows that may go on.
FAR = 2**30


def normalize_index(
    index: Any, batch_size: int | None, length: int | None, capacity: int | None
) -> Any:
    """Checks and converts the index at which `length` new entries are written.

    Args:
        index: What the caller gave as `cache_update_index`.
        batch_size: `B`, or `None` if unknown.
        length: `T`, how many entries each row brings, or `None` if unknown.
        capacity: `S`, or `None` for a cache without an end or of unknown size.

    Returns:
        The index: an `int`, or an int32 tensor of shape `()` or `(B,)`.

    Raises:
        TypeError: The index isn't an integer.
        ValueError: Its shape is neither `()` nor `(B,)`, or its value is known
            and `0 <= index`, `index + T <= S` doesn't hold. An index that is
            being traced can't be checked: see `splice` for what happens then.
    """
    is_tensor = ops.is_tensor(index) or isinstance(index, np.ndarray)
    is_tensor = is_tensor or keras.backend.is_keras_tensor(index)
    if not (is_tensor or is_integer(index)):
        raise TypeError(
            "`cache_update_index` must be an integer or an integer tensor. "
            f"Received: {index!r} of type {type(index).__name__}"
        )
    if is_integer(index):
        index = int(index)
    else:
        if not keras.backend.is_keras_tensor(index):
            index = ops.convert_to_tensor(index)
        if "int" not in keras.backend.standardize_dtype(index.dtype):
            raise TypeError(
                "`cache_update_index` must be an integer or an integer tensor. "
                f"Received a tensor of dtype {index.dtype}"
            )
        shape = tuple(index.shape)
        fits_batch = len(shape) == 1 and (
            None in (shape[0], batch_size) or shape[0] == batch_size
        )
        if shape != () and not fits_batch:
            raise ValueError(
                "`cache_update_index` must be an int, a scalar tensor or one "
                f"index a row, shape (B,) = ({batch_size},). Received a tensor "
                f"of shape {shape}"
            )
    value = concrete_value(index)
    if value is not None and length is not None:
        # Not `value + length`, which may pass what the index's dtype can hold.
        beyond = capacity is not None and (value > capacity - length).any()
        if (value < 0).any() or beyond:
            raise ValueError(
                "`cache_update_index` must not be negative, and index + T must not "
                f"pass the capacity S of the cache. Received: index={value.tolist()}, "
                f"T={length}, S={capacity}"
            )
    return index if isinstance(index, int) else as_int32(index)


def as_int32(index: Any) -> Any:
    """Casts an integer tensor to int32 and clamps what int32 can't hold.

    A plain cast of 2**32 would give the index 0, and a write there.
    """
    dtype = keras.backend.standardize_dtype(index.dtype)
    # `where`, as Keras' `minimum` casts to int32 before it compares.
    if dtype in ("int64", "uint32", "uint64"):
        index = ops.where(index > FAR, FAR, index)
    if dtype == "int64":
        index = ops.where(index < -1, -1, index)
    return ops.cast(index, "int32")


def write_slot(index: Any, capacity: int) -> Any:
    """The first slot that entries at `index` are written to.

    Args:
        index: An int, or an integer tensor of shape `()` or `(B,)`.
        capacity: `S`.

    Returns:
        The index; or `capacity`, where every write is dropped, if it is negative, so
        that no entry is written even where later ones would land in the cache.
    """
    if isinstance(index, int):
        return index if index >= 0 else capacity
    index = as_int32(index)
    return ops.where(index < 0, capacity, index)


def first_positions(index: Any) -> Any:
    """An index as int32 `(1 | B,)`: the position of each row's first token."""
    return ops.reshape(as_int32(ops.convert_to_tensor(index)), (-1,))


def token_positions(index: Any, length: int) -> Any:
    """Absolute positions of `length` tokens that start at `index`.

    Args:
        index: An int, or an integer tensor of shape `()` or `(B,)`.
        length: `T`.

    Returns:
        An int32 tensor of shape `(1, T)`, or `(B, T)` if each row has its index.
    """
    return first_positions(index)[:, None] + ops.arange(length, dtype="int32")[None, :]
