"""What every cache refuses."""

import math

import keras


def check_arrays(name, arrays, rank, sizes):
    """Refuses cache arrays that don't fit the attention that reads them.

    Args:
        name: How the caller named what is checked, for the message.
        arrays: Tensors.
        rank: How many axes each must have.
        sizes: `{what: (axis, size)}`, with `None` for a size that is unknown.

    Raises:
        ValueError: The rank or a size differs.
        TypeError: The dtype isn't a float.
    """
    for array in arrays:
        shape, dtype = tuple(array.shape), keras.backend.standardize_dtype(array.dtype)
        if len(shape) != rank:
            raise ValueError(f"{name} must have {rank} axes. Received: shape={shape}")
        if not keras.backend.is_float_dtype(dtype):
            raise TypeError(
                f"{name} must hold floats. Received: dtype={dtype}, shape={shape}"
            )
        for what, (axis, size) in sizes.items():
            if None not in (shape[axis], size) and shape[axis] != size:
                raise ValueError(
                    f"{name} must have {what} = {size} on axis {axis}. Received: "
                    f"{shape[axis]}, in an array of shape {shape}"
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
