"""The static cache: head-major buffers of doubling size."""

from dataclasses import dataclass
from typing import Any

import jax
from keras import ops

from keras_kvcache.caches.base import Cache
from keras_kvcache.caches.checks import check_arrays, nbytes
from keras_kvcache.ops import (
    View,
    head_major_segment,
    splice,
    token_positions,
    write_slot,
)

# Slots of the first segment: small enough that a short text costs little to
# read, large enough that a long one has few segments to merge and compile.
FIRST_SEGMENT = 256


def segment_sizes(capacity):
    """How `capacity` slots are cut: 256, 256, 512, 1024, …, the last cut short.

    Each segment doubles what was there, so a text is read at most twice as far
    as it reaches, in a number of segments that grows with the logarithm.
    """
    sizes, total = [], 0
    while total < capacity:
        size = min(max(total, FIRST_SEGMENT), capacity - total)
        sizes.append(size)
        total += size
    return tuple(sizes)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False, repr=False)
class StaticCache(Cache):
    """Keys and values of one layer, heads before slots; the slot is the position.

    Attributes:
        keys: Tuple of tensors `(B, K, H, n)`, one a segment. Slots come last, as a
            product with few queries reads them fastest so.
        values: Tuple of tensors `(B, K, n, Hv)`, as many slots each.
    """

    keys: tuple[Any, ...]
    values: tuple[Any, ...]

    @property
    def capacity(self):
        """See `Cache.capacity`."""
        return sum(values.shape[2] for values in self.values)

    @property
    def nbytes(self):
        """See `Cache.nbytes`."""
        return nbytes(self.keys + self.values)

    def check(self, batch_size, heads, key_dim, value_dim):
        """See `Cache.check`."""
        sizes = {"batch size B": (0, batch_size), "key/value heads K": (1, heads)}
        for name, arrays, head_size in (
            ("`cache` keys", self.keys, (2, key_dim)),
            ("`cache` values", self.values, (3, value_dim)),
        ):
            check_arrays(name, arrays, 4, {**sizes, "head size H": head_size})
        slots = [
            [keys.shape[3] for keys in self.keys],
            [values.shape[2] for values in self.values],
        ]
        if slots[0] != slots[1] or not slots[0]:
            raise ValueError(
                "`cache` must have keys and values in segments of as many slots. "
                f"Received: keys in {slots[0]}, values in {slots[1]}"
            )

    def update(self, key, value, index):
        """See `Cache.update`."""
        fill = token_positions(index, 1)[:, 0] + ops.shape(key)[1]
        key = ops.transpose(key, (0, 2, 3, 1))
        value = ops.transpose(value, (0, 2, 1, 3))
        slot = write_slot(index, self.capacity)
        keys, values = [], []
        for stored_keys, stored_values in zip(self.keys, self.values, strict=True):
            # Seen from a segment, most writes are past its end and dropped.
            keys.append(splice(stored_keys, key, slot, axis=3))
            values.append(splice(stored_values, value, slot))
            slot = slot - stored_values.shape[2]
        cache = StaticCache(tuple(keys), tuple(values))
        return cache, cache.view(fill)

    def view(self, fill=None):
        """See `Cache.view`."""
        segments, first = [], 0
        for keys, values in zip(self.keys, self.values, strict=True):
            positions = first + ops.arange(values.shape[2], dtype="int32")[None]
            segments.append(head_major_segment(keys, values, positions))
            first += values.shape[2]
        _, heads, _, value_dim = self.values[0].shape
        return View(tuple(segments), heads, value_dim, fill)

    def to_dense(self):
        """The same entries as one tensor `(B, 2, S, K, H)`; exact.

        Raises:
            ValueError: Keys and values differ in head size.
        """
        key_dim, value_dim = self.keys[0].shape[2], self.values[0].shape[3]
        if key_dim != value_dim:
            raise ValueError(
                "A dense cache needs keys and values of one head size. "
                f"Received: key_dim={key_dim}, value_dim={value_dim}"
            )
        keys = ops.transpose(ops.concatenate(self.keys, axis=3), (0, 3, 1, 2))
        values = ops.transpose(ops.concatenate(self.values, axis=2), (0, 2, 1, 3))
        return ops.stack([keys, values], axis=1)
