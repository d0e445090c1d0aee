"""Slots used over and over: position `p` is kept in slot `p % R`, until `p + R`."""

from typing import Any

from keras import ops


def ring_positions(
    fill: Any, ring: int, first: int = 0, count: int | None = None
) -> Any:
    """Which positions the slots of a ring hold.

    Args:
        fill: int32 `(1 | B,)`: positions below it were written.
        ring: `R`, how many slots there are.
        first: The first slot asked for.
        count: How many are asked for; `None` for all from `first` on.

    Returns:
        int32 `(1 | B, count)`: in each slot the latest position below `fill` that
        belongs there; negative where there was none yet.
    """
    count = ring - first if count is None else count
    slots = first + ops.arange(count, dtype="int32")[None, :]
    last = fill[:, None] - 1
    return last - ops.mod(last - slots, ring)


def write_ring(
    buffer: Any, update: Any, start: Any, end: Any, ring: int, first: int, axis: int
) -> Any:
    """Writes entries into some slots of a ring, each into the slot of its position.

    This passes over the whole buffer, as those who attend the entries do.

    Args:
        buffer: The slots from `first` on: tensor with batch on axis 0 and slots on
            `axis`.
        update: Tensor of the same shape but for `T` entries on `axis`.
        start: int32 `(1 | B,)`, position of the first entry.
        end: int32 `(1 | B,)`; entries from this position on aren't written.
        ring: `R`.
        first: The first slot of the buffer.
        axis: Where the slots are; positive.

    Returns:
        The updated buffer. Of two entries for one slot the later one stays.
    """
    positions = ring_positions(end, ring, first, buffer.shape[axis])
    entry = positions - start[:, None]
    shape = [-1] + [1] * (len(buffer.shape) - 1)
    shape[axis] = buffer.shape[axis]
    is_new = ops.reshape(entry >= 0, shape)
    entry = ops.clip(entry, 0, ops.shape(update)[axis] - 1)
    entry = ops.broadcast_to(ops.reshape(entry, shape), ops.shape(buffer))
    update = ops.take_along_axis(update, entry, axis=axis)
    return ops.where(is_new, ops.cast(update, buffer.dtype), buffer)
