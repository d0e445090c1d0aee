"""Writing new entries into a cache without touching the rest of it."""

import keras
from keras import ops

from keras_kvcache.ops.positions import as_int32


def splice(buffer, update, index):
    """Writes `update` into `buffer` from slot `index` on.

    The buffer's slots lie on axis 2: `(B, 2, S, K, H)` and `(B, K, S, H)` both
    fit. What would land outside `[0, S)` is dropped and every stored entry stays
    as it was. (`dynamic_update_slice` alone moves such a write to where it fits,
    over entries that others still need.) Compiled, with the buffer donated, this
    touches `T` slots and copies nothing.

    Args:
        buffer: Tensor with batch on axis 0 and `S` slots on axis 2.
        update: Tensor of the same shape but for `T` entries on axis 2. It is
            cast to the buffer's dtype.
        index: An int, or an integer tensor of shape `()` or `(B,)`.

    Returns:
        The updated buffer, of the same shape and dtype.
    """
    update = ops.cast(update, buffer.dtype)
    if update.shape[2] is None:
        # Only TensorFlow has sizes that are unknown until a program runs.
        index = as_int32(ops.convert_to_tensor(index))
        return _splice_rows(buffer, update, ops.reshape(index, (-1,)))
    if isinstance(index, int):
        return _splice_known(buffer, update, index)
    index = as_int32(index)
    if len(index.shape) == 0:
        return _splice_traced(buffer, update, index, axis=2)
    if index.shape[0] == 1:
        return _splice_traced(buffer, update, index[0], axis=2)
    if keras.backend.backend() == "jax":
        return ops.vectorized_map(
            lambda row: _splice_traced(*row, axis=1), (buffer, update, index)
        )
    return _splice_rows(buffer, update, index)


def _splice_known(buffer, update, index):
    """The index is a Python int: cut what doesn't fit, then write."""
    capacity, length = buffer.shape[2], update.shape[2]
    first, last = max(index, 0), min(index + length, capacity)
    if first >= last:
        return buffer
    if last - first < length:
        update = update[:, :, first - index : last - index]
    start = [0] * len(buffer.shape)
    start[2] = first
    return ops.slice_update(buffer, start, update)


def _splice_traced(buffer, update, index, axis):
    """Reads the slots at a place that exists, keeps or replaces, writes back."""
    capacity, length = buffer.shape[axis], update.shape[axis]
    width = min(length, capacity)
    first = ops.clip(index, 0, capacity - width)
    start = [0] * len(buffer.shape)
    start[axis] = first
    window = list(ops.shape(buffer))
    window[axis] = width
    token = first - index + ops.arange(width, dtype="int32")
    fits = ops.logical_and(token >= 0, token < length)
    if length > 1:
        update = ops.take(update, ops.clip(token, 0, length - 1), axis=axis)
    stored = ops.slice(buffer, start, window)
    fits = ops.reshape(fits, [-1] + [1] * (len(buffer.shape) - axis - 1))
    return ops.slice_update(buffer, start, ops.where(fits, update, stored))


def _splice_rows(buffer, update, index):
    """One index a row, for backends that can't map a slice over rows."""
    capacity, length = buffer.shape[2], ops.shape(update)[2]
    token = ops.arange(capacity, dtype="int32")[None, :] - index[:, None]
    fits = ops.logical_and(token >= 0, token < length)
    shape = [-1, 1, capacity] + [1] * (len(buffer.shape) - 3)
    if update.shape[2] != 1:
        source = ops.reshape(ops.clip(token, 0, length - 1), shape)
        source = ops.broadcast_to(source, ops.shape(buffer))
        update = ops.take_along_axis(update, source, axis=2)
    return ops.where(ops.reshape(fits, shape), update, buffer)
