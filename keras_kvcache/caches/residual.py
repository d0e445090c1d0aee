"""The residual entries of a cache whose codec codes keys in groups."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
from keras import ops

from keras_kvcache.attention.segments import Segment
from keras_kvcache.caches.storage import Storage, select_rows, slot_positions
from keras_kvcache.runtime.sharding import distribute


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False, repr=False)
class Residual:
    """The code group that isn't full yet; its keys stay exact until it is.

    Attributes:
        storage: `Storage` of one group.
        start: int32 `(B,)`, position of the group's first entry.
    """

    storage: Storage
    start: Any

    def append(
        self, coded: Callable[[Any], Storage], entries: Storage, index: Any, fill: Any
    ) -> tuple[Residual, Storage, Any]:
        """Appends new entries, and returns them in whole groups, to be quantized.

        Args:
            coded: Function of the position `(1 | B,)` of a group's first entry that
                returns the quantized group, a `Storage`. It's called where a cache was
                rolled back into a group that was full.
            entries: `Storage` of the `T` new entries, keys exact.
            index: int32 `(1 | B,)`, position of the first.
            fill: int32 `(1 | B,)`; entries at or past this position are padding.

        Returns:
            `(residual, ahead, start)`: the new `Residual`; the entries with those of
            their group before them, a `Storage` of whole groups, keys exact; the
            position of the first one, int32 `(1 | B,)`.
        """
        storage, held_start = self.storage.distributed(), distribute(self.start)
        group = storage.slots
        start = index // group * group
        held = _either_rows(
            ops.logical_or(held_start == start, index == start),
            storage,
            lambda: coded(start).recode_keys(storage.codec),
        )
        length = entries.slots
        groups = (group + length - 2) // group + 1

        def lengthen(array, axis, first, size):
            widths = [[0, 0] for _ in array.shape]
            widths[axis.slots][1] = (groups - 1) * group
            return ops.pad(array, widths)

        ahead = held.map(lengthen).write(entries, index - start)
        new_start = fill // group * group
        number = ops.clip((new_start - start) // group, 0, groups - 1)
        residual = ahead.take(number * group, group)
        # Rows that brought nothing stay as they were.
        brought = fill > index
        arrays = select_rows(brought, residual.segments[0], storage.segments[0])
        residual = replace(residual, segments=(arrays,))
        new_start = ops.where(brought, new_start, held_start)
        return Residual(residual, new_start).distributed(), ahead, start

    def distributed(self) -> Residual:
        """The group laid out over devices as `keras.distribution` has it."""
        return Residual(self.storage.distributed(), distribute(self.start))

    def segment(self) -> Segment:
        """The group as a `Segment` for attention."""
        size = self.storage.slots
        positions = self.start[:, None] + slot_positions(0, size)
        return self.storage.segment(0, size, positions)


def _either_rows(predicate, storage, other):
    """`storage` in rows where a predicate holds, `other()` elsewhere, if any is."""

    def select():
        arrays = select_rows(predicate, storage.segments[0], other().segments[0])
        return list(arrays)

    arrays = ops.cond(ops.all(predicate), lambda: list(storage.segments[0]), select)
    return replace(storage, segments=(tuple(arrays),))
