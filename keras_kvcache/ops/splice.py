"""Writing new entries into a cache without touching the rest of it."""

import keras
from keras import ops

from keras_kvcache.ops.platform import is_tpu
from keras_kvcache.ops.positions import as_int32
from keras_kvcache.ops.sharding import rows_divide


def splice(buffer, update, index, axis=2):
    """Writes `update` into `buffer` from slot `index` on.

    What would land outside `[0, S)` is dropped and every stored entry stays as it
    was. (`dynamic_update_slice` alone moves such a write to where it fits, over
    entries that others still need.) Compiled, with the buffer donated, this touches
    `T` slots and copies nothing.

    Args:
        buffer: Tensor with batch on axis 0 and `S` slots on `axis`, such as
            `(B, 2, S, K, H)` or `(B, K, S, H)`.
        update: Tensor of the same shape but for `T` entries on `axis`. It is
            cast to the buffer's dtype.
        index: An int, or an integer tensor of shape `()` or `(B,)`.
        axis: Where the slots are; positive.

    Returns:
        The updated buffer, of the same shape and dtype.
    """
    update = ops.cast(update, buffer.dtype)
    # Unknown, it is `None` in TensorFlow and a symbol in a program that JAX exports.
    is_known = isinstance(update.shape[axis], int)
    if isinstance(index, int) and is_known:
        return _splice_known(buffer, update, index, axis)
    index = ops.reshape(as_int32(ops.convert_to_tensor(index)), (-1,))
    strategy = choose_strategy(index.shape[0] == 1, is_known, buffer.shape[0])
    return STRATEGIES[strategy](buffer, update, index, axis)


def choose_strategy(is_shared, is_known, rows):
    """How entries get to their slots when the index is a tensor.

    Args:
        is_shared: Whether one index holds for all rows.
        is_known: Whether the number of entries is known.
        rows: `B`.

    Returns:
        A key of `STRATEGIES`. `"slice"` writes one run of slots in all rows;
        `"scatter"` one in each row, which XLA does in place, but on a TPU one
        element after the other (https://github.com/jax-ml/jax/issues/21367), and
        across devices after gathering rows that they can't share evenly; `"where"`
        passes over the whole buffer and needs no support by the backend.
    """
    if is_known and is_shared:
        return "slice"
    is_jax = keras.backend.backend() == "jax"
    suits = is_jax and not is_tpu() and rows_divide(rows)
    return "scatter" if is_known and suits else "where"


def _splice_known(buffer, update, index, axis):
    """The index is a Python int: cut what doesn't fit, then write."""
    capacity, length = buffer.shape[axis], update.shape[axis]
    first, last = max(index, 0), min(index + length, capacity)
    if first >= last:
        return buffer
    if last - first < length:
        fits = slice(first - index, last - index)
        update = update[(*[slice(None)] * axis, fits)]
    start = [0] * len(buffer.shape)
    start[axis] = first
    return ops.slice_update(buffer, start, update)


def _splice_shared(buffer, update, index, axis):
    """One index `(1,)` for all rows."""
    return _splice_slice(buffer, update, index[0], axis)


def _splice_scatter(buffer, update, index, axis):
    """One index a row: a slice mapped over rows, of which XLA makes a scatter."""
    index = ops.broadcast_to(index, (ops.shape(buffer)[0],))
    return ops.vectorized_map(
        lambda row: _splice_slice(*row, axis - 1), (buffer, update, index)
    )


def _splice_slice(buffer, update, index, axis):
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


def _splice_where(buffer, update, index, axis):
    """One index a row: each slot takes the entry that belongs there, or stays."""
    capacity, length = buffer.shape[axis], ops.shape(update)[axis]
    token = ops.arange(capacity, dtype="int32")[None, :] - index[:, None]
    fits = ops.logical_and(token >= 0, token < length)
    shape = [-1] + [1] * (len(buffer.shape) - 1)
    shape[axis] = capacity
    if update.shape[axis] != 1:
        source = ops.reshape(ops.clip(token, 0, length - 1), shape)
        source = ops.broadcast_to(source, ops.shape(buffer))
        update = ops.take_along_axis(update, source, axis=axis)
    return ops.where(ops.reshape(fits, shape), update, buffer)


STRATEGIES = {
    "slice": _splice_shared,
    "scatter": _splice_scatter,
    "where": _splice_where,
}
