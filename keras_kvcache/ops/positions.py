"""Where tokens stand: the update index and the positions that follow from it."""

import numbers

import keras
from keras import ops

from keras_kvcache.ops.known import known_value


def check_index(index, batch_size, length, capacity):
    """Refuses an index at which `length` new entries can't be written.

    Args:
        index: What the caller gave as `cache_update_index`.
        batch_size: `B`, or `None` if unknown.
        length: `T`, how many entries each row brings, or `None` if unknown.
        capacity: `S`, or `None` for a cache without an end or of unknown size.

    Returns:
        The index: an `int`, or an integer tensor of shape `()` or `(B,)`.

    Raises:
        TypeError: The index isn't an integer.
        ValueError: Its shape is neither `()` nor `(B,)`, or its value is known
            and `0 <= index`, `index + T <= S` doesn't hold. An index that is
            being traced can't be checked: see `splice` for what happens then.
    """
    if isinstance(index, bool) or (
        isinstance(index, numbers.Number) and not isinstance(index, numbers.Integral)
    ):
        raise TypeError(
            "`cache_update_index` must be an integer or an integer tensor. "
            f"Received: {index!r} of type {type(index).__name__}"
        )
    if isinstance(index, numbers.Integral):
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
    value = known_value(index)
    if value is None or length is None:
        return index
    beyond = capacity is not None and (value + length > capacity).any()
    if (value < 0).any() or beyond:
        raise ValueError(
            "`cache_update_index` must not be negative, and index + T must not "
            f"pass the capacity S of the cache. Received: index={value.tolist()}, "
            f"T={length}, S={capacity}"
        )
    return index


def token_positions(index, length):
    """Absolute positions of `length` tokens that start at `index`.

    Args:
        index: An int, or an integer tensor of shape `()` or `(B,)`.
        length: `T`.

    Returns:
        An int32 tensor of shape `(1, T)`, or `(B, T)` if each row has its index.
    """
    first = ops.reshape(ops.cast(ops.convert_to_tensor(index), "int32"), (-1, 1))
    return first + ops.arange(length, dtype="int32")[None, :]
