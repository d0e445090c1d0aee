"""The static cache: head-major buffers of doubling size."""

from dataclasses import dataclass
from typing import Any

import jax
from keras import ops

from keras_kvcache.caches.base import Cache
from keras_kvcache.caches.checks import check_arrays, nbytes
from keras_kvcache.ops import Segment, View, splice, token_positions, write_slot

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
        keys: Tuple of tensors `(B, K, n, H)`, one a segment.
        values: Tuple of tensors `(B, K, n, Hv)`, as many slots each.
    """

    keys: tuple[Any, ...]
    values: tuple[Any, ...]

    @property
    def capacity(self):
        """See `Cache.capacity`."""
        return sum(keys.shape[2] for keys in self.keys)

    @property
    def nbytes(self):
        """See `Cache.nbytes`."""
        return nbytes(self.keys + self.values)

    def check(self, batch_size, heads, key_dim, value_dim):
        """See `Cache.check`."""
        sizes = {"batch size B": (0, batch_size), "key/value heads K": (1, heads)}
        for name, arrays, head_dim in (
            ("`cache` keys", self.keys, key_dim),
            ("`cache` values", self.values, value_dim),
        ):
            check_arrays(name, arrays, 4, {**sizes, "head size H": (3, head_dim)})
        slots = [
            [array.shape[2] for array in half] for half in (self.keys, self.values)
        ]
        if slots[0] != slots[1] or not slots[0]:
            raise ValueError(
                "`cache` must have keys and values in segments of as many slots. "
                f"Received: keys in {slots[0]}, values in {slots[1]}"
            )

    def update(self, key, value, index):
        """See `Cache.update`."""
        fill = token_positions(index, 1)[:, 0] + ops.shape(key)[1]
        key, value = (ops.transpose(entries, (0, 2, 1, 3)) for entries in (key, value))
        slot = write_slot(index, self.capacity)
        keys, values = [], []
        for stored_keys, stored_values in zip(self.keys, self.values, strict=True):
            # Seen from a segment, most writes are past its end and dropped.
            keys.append(splice(stored_keys, key, slot))
            values.append(splice(stored_values, value, slot))
            slot = slot - stored_keys.shape[2]
        cache = StaticCache(tuple(keys), tuple(values))
        return cache, cache.view(fill)

    def view(self, fill=None):
        """See `Cache.view`."""
        segments, first = [], 0
        for keys, values in zip(self.keys, self.values, strict=True):
            positions = first + ops.arange(keys.shape[2], dtype="int32")[None]
            segments.append(Segment(lambda pair=(keys, values): pair, positions))
            first += keys.shape[2]
        _, heads, _, value_dim = self.values[0].shape
        return View(tuple(segments), heads, value_dim, fill)

    def to_dense(self):
        """The same entries as one tensor `(B, 2, S, K, H)`; exact.

        Raises:
            ValueError: Keys and values differ in head size.
        """
        key_dim, value_dim = self.keys[0].shape[-1], self.values[0].shape[-1]
        if key_dim != value_dim:
            raise ValueError(
                "A dense cache needs keys and values of one head size. "
                f"Received: key_dim={key_dim}, value_dim={value_dim}"
            )
        keys = ops.concatenate(self.keys, axis=2)
        values = ops.concatenate(self.values, axis=2)
        return ops.transpose(ops.stack([keys, values], axis=1), (0, 1, 3, 2, 4))
