"""The dense cache: one tensor a layer, slots before heads."""

from dataclasses import dataclass
from typing import Any

import jax
from keras import ops

from keras_kvcache.caches.base import Cache
from keras_kvcache.caches.checks import check_arrays, nbytes
from keras_kvcache.caches.static import StaticCache, segment_sizes
from keras_kvcache.ops import View, dense_segment, splice, token_positions, write_slot


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False, repr=False)
class DenseCache(Cache):
    """Keys and values of one layer in one tensor; the slot is the position.

    This is the form that users hold in their hands and that `keras.Input` can
    carry. It is updated in place when compiled and donated, and read as it lies,
    though not as fast as a `StaticCache`.

    Attributes:
        tensor: `(B, 2, S, K, H)`, keys at 0 and values at 1 of axis 1.
    """

    tensor: Any

    @property
    def capacity(self):
        """See `Cache.capacity`."""
        return self.tensor.shape[2]

    @property
    def nbytes(self):
        """See `Cache.nbytes`."""
        return nbytes([self.tensor])

    def check(self, batch_size, heads, key_dim, value_dim):
        """See `Cache.check`."""
        if key_dim != value_dim:
            raise ValueError(
                "`cache` can't be a dense tensor when `key_dim` and `value_dim` "
                "differ, as keys and values share its last axis; use a "
                f"StaticCache. Received: key_dim={key_dim}, value_dim={value_dim}"
            )
        sizes = {
            "batch size B": (0, batch_size),
            "keys and values": (1, 2),
            "key/value heads K": (3, heads),
            "head size H": (4, key_dim),
        }
        check_arrays("`cache`", [self.tensor], 5, sizes)

    def update(self, key, value, index):
        """See `Cache.update`."""
        entries = ops.stack([key, value], axis=1)
        slot = write_slot(index, self.capacity)
        cache = DenseCache(splice(self.tensor, entries, slot))
        fill = token_positions(index, 1)[:, 0] + ops.shape(key)[1]
        return cache, cache.view(fill)

    def view(self, fill=None):
        """See `Cache.view`."""
        segments, first = [], 0
        for size in segment_sizes(self.capacity):
            positions = first + ops.arange(size, dtype="int32")[None]
            segments.append(dense_segment(self.tensor, first, positions))
            first += size
        return View(tuple(segments), *self.tensor.shape[3:], fill)

    def to_static(self):
        """The same entries as a head-major `StaticCache`; exact."""
        keys, values, first = [], [], 0
        for size in segment_sizes(self.capacity):
            part = self.tensor[:, :, first : first + size]
            keys.append(ops.transpose(part[:, 0], (0, 2, 3, 1)))
            values.append(ops.transpose(part[:, 1], (0, 2, 1, 3)))
            first += size
        return StaticCache(tuple(keys), tuple(values))
