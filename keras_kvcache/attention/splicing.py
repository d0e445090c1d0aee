"""Writing new entries into a cache without touching the rest of it."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import keras
from keras import ops

from keras_kvcache.attention.positions import first_positions
from keras_kvcache.attention.segments import start_of_slice
from keras_kvcache.runtime.platform import current_platform
from keras_kvcache.runtime.sharding import rows_divide

# Where the last axis is shorter, a TPU's layout swaps the last two.
LANES = 128


def splice(buffer: Any, update: Any, index: Any, axis: int = 2) -> Any:
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
    index = first_positions(index)
    strategy = choose_strategy(index.shape[0] == 1, is_known, buffer.shape, axis)
    return STRATEGIES[strategy](buffer, update, index, axis)


def choose_strategy(
    is_one_index: bool, is_known: bool, shape: Sequence[int], axis: int
) -> str:
    """How entries get to their slots when the index is a tensor.

    Args:
        is_one_index: Whether one index holds for all rows.
        is_known: Whether the number of entries is known.
        shape, axis: Of the buffer, and where its slots are.

    Returns:
        A key of `STRATEGIES`. `"slice"` writes one run of slots in all rows.
        `"scatter"` writes one run in each row: XLA does it in place, but gathers rows
        that devices can't share evenly, and copies the buffer on a TPU. `"loop"` writes
        row by row, in place on a TPU if slots are on one of the last two axes, and
        takes no turn if nothing lands. (With a slice XLA would lay the buffer out for
        writing, and copy it to attend it.)
        `"gather"` is for PyTorch, with one index or one a row: no value of the index is
        needed, so it can be recorded.
        `"where"` passes over the whole buffer and needs no support by the backend.
    """
    if is_known and _suits_loop(shape, axis):
        return "loop"
    if is_known and keras.backend.backend() == "torch":
        return "gather"
    if is_known and is_one_index:
        return "slice"
    suits = current_platform().scatters and rows_divide(shape[0])
    return "scatter" if is_known and suits else "where"


def _suits_loop(shape, axis):
    is_here = current_platform().loops_writes
    is_here = is_here and keras.distribution.distribution() is None
    # A number of rows is a symbol in a program that JAX exports.
    has_rows = isinstance(shape[0], int) and shape[0] > 0
    return is_here and has_rows and axis > 0 and axis >= len(shape) - 2


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


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _splice_loop(buffer, update, index, axis):
    """One row after the other, or all at once if they share `(1,)` index."""
    if axis == len(buffer.shape) - 2 and buffer.shape[-1] < LANES:
        # As a TPU keeps them. Another order would be a copy before and after.
        flipped = (ops.swapaxes(array, -1, -2) for array in (buffer, update))
        return ops.swapaxes(_splice_loop(*flipped, index, axis + 1), -1, -2)
    (turns,), capacity, length = index.shape, buffer.shape[axis], update.shape[axis]
    lands = ops.any(ops.logical_and(index > -length, index < capacity))
    rows = 1 if turns > 1 else buffer.shape[0]

    def write(turn, buffer):
        start = start_of_slice([turn] + [0] * (len(update.shape) - 1))
        entries = ops.slice(update, start, (rows, *update.shape[1:]))
        return _splice_slice(buffer, entries, index[turn], axis, rows, turn)

    return ops.fori_loop(0, ops.where(lands, turns, 0), write, buffer)


@_splice_loop.defjvp
def _differentiate_loop(axis, primals, tangents):
    """JAX can't reverse a loop whose number of turns is a tensor, but it's linear."""
    of_buffer, of_update, _ = tangents
    tangent = _splice_where(of_buffer, of_update, primals[2], axis)
    return _splice_loop(*primals, axis), tangent


def _splice_slice(buffer, update, index, axis, rows=None, first_row=0):
    """Clamps the window, keeps what must not change in it, and writes it back.

    It does so in `rows` rows from `first_row` on, or in all.
    """
    capacity, length = buffer.shape[axis], update.shape[axis]
    width = min(length, capacity)
    first = ops.clip(index, 0, capacity - width)
    start = [first_row] + [0] * (len(buffer.shape) - 1)
    start[axis] = first
    start = start_of_slice(start)
    window = list(ops.shape(buffer))
    window[axis] = width
    window[0] = window[0] if rows is None else rows
    token = first - index + ops.arange(width, dtype="int32")
    fits = ops.logical_and(token >= 0, token < length)
    if length > 1:
        update = ops.take(update, ops.clip(token, 0, length - 1), axis=axis)
    stored = ops.slice(buffer, start, window)
    fits = ops.reshape(fits, [-1] + [1] * (len(buffer.shape) - axis - 1))
    return ops.slice_update(buffer, start, ops.where(fits, update, stored))


def _splice_gather(buffer, update, index, axis):
    """As `_splice_slice`, by a gather and a scatter."""
    import torch

    buffer = ops.convert_to_tensor(buffer)
    capacity, length = buffer.shape[axis], update.shape[axis]
    width = min(length, capacity)
    first = ops.clip(index, 0, capacity - width)
    slot = first[:, None] + ops.arange(width, dtype="int32")
    token = slot - index[:, None]
    fits = ops.logical_and(token >= 0, token < length)
    shape, window = [-1] + [1] * (len(buffer.shape) - 1), list(buffer.shape)
    shape[axis] = window[axis] = width

    def numbers(tensor):
        return tensor.reshape(shape).expand(window).long()

    if length > 1:
        update = torch.gather(update, axis, numbers(ops.clip(token, 0, length - 1)))
    slot = numbers(slot)
    stored = torch.gather(buffer, axis, slot)
    entries = torch.where(fits.reshape(shape), update, stored)
    return torch.scatter(buffer, axis, slot, entries)


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
    "gather": _splice_gather,
    "scatter": _splice_scatter,
    "loop": _splice_loop,
    "where": _splice_where,
}
