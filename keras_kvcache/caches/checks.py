"""What every cache refuses."""

import math

import keras


def check_arrays(name, arrays, batch_size, heads, head_dim, heads_axis):
    """Refuses cache arrays that don't fit the attention that reads them.

    Args:
        name: How the caller named what is checked, for the message.
        arrays: Tensors with batch on axis 0 and head size on the last axis.
        batch_size: `B`, or `None` if unknown.
        heads: `K`.
        head_dim: `H`.
        heads_axis: Axis of the key/value heads.

    Raises:
        ValueError: A size differs.
        TypeError: The dtype isn't a float.
    """
    for array in arrays:
        shape, dtype = tuple(array.shape), keras.backend.standardize_dtype(array.dtype)
        if not keras.backend.is_float_dtype(dtype):
            raise TypeError(
                f"{name} must hold floats. Received: dtype={dtype}, shape={shape}"
            )
        sizes = {
            "batch size B": (shape[0], batch_size),
            "key/value heads K": (shape[heads_axis], heads),
            "head size H": (shape[-1], head_dim),
        }
        for what, (have, need) in sizes.items():
            if None not in (have, need) and have != need:
                raise ValueError(
                    f"{name} must have {what} = {need}. Received: {have}, in an "
                    f"array of shape {shape}"
                )


def nbytes(arrays):
    """Bytes that the arrays take in memory."""
    total = 0
    for array in arrays:
        total += math.prod(array.shape) * itemsize(array.dtype)
    return total


def itemsize(dtype):
    """Bytes of one number of a float dtype."""
    sizes = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
    dtype = keras.backend.standardize_dtype(dtype)
    if dtype not in sizes:
        raise TypeError(f"`dtype` must be one of {list(sizes)}. Received: {dtype}")
    return sizes[dtype]
