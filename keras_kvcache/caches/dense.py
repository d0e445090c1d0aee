"""Dense storage: the tensor that users hold in their hands."""

from dataclasses import dataclass, replace

import jax
from keras import ops

from keras_kvcache.caches.sizes import segment_sizes
from keras_kvcache.caches.storage import Field, Storage
from keras_kvcache.ops import dense_segment, slots_of, start_of_slice

# Axes of the head size and of the slots: where keys and values share one array
# `(B, 2, S, K, H)`, and where each have their own `(B, S, K, H)`.
SHARED = (4, 2)
OWN = (3, 1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False, repr=False)
class DenseStorage(Storage):
    """One segment of exact entries, whose slots come before the heads.

    Its array is `(B, 2, S, K, H)`, keys at 0 and values at 1 of axis 1. Values of
    another head size have an array of their own: then keys are `(B, S, K, H)` and
    values `(B, S, K, Hv)`. It's updated in place when compiled and donated, and read as
    it lies: at memory speed by kernels, more slowly by XLA.
    """

    @classmethod
    def allocate(cls, spec, slots, codec, make):
        """See `Storage.allocate`."""
        rows, heads = spec.batch_size, spec.num_key_value_heads
        head_dim, value_dim = spec.head_dim, spec.value_dim or spec.head_dim
        ((_, _, dtype),) = codec.key_parts(head_dim)
        if head_dim == value_dim:
            arrays = (make((rows, 2, slots, heads, head_dim), dtype),)
        else:
            arrays = tuple(
                make((rows, slots, heads, width), dtype)
                for width in (head_dim, value_dim)
            )
        return cls((arrays,), codec, head_dim, value_dim)

    @property
    def is_shared(self):
        """Whether keys and values share one array."""
        return self.head_dim == self.value_dim

    @property
    def _kernels_read(self):
        return self.is_shared and self.codec.kernels_read

    @property
    def fields(self):
        """See `Storage.fields`."""
        return (Field(SHARED[1], 1),) if self.is_shared else (Field(OWN[1], 1),) * 2

    def encode(self, key, value, codec=None):
        """See `Storage.encode`."""
        if self.is_shared:
            both = ops.stack([key, value], axis=1)
            return replace(self, segments=(self.codec.encode_keys(both, *SHARED),))
        keys = self.codec.encode_keys(key, *OWN)
        values = self.codec.encode_values(value, *OWN)
        return replace(self, segments=((*keys, *values),))

    def _read(self, half, start, count):
        """Some slots of keys (0) or values (1), `(B, count, K, H | Hv)`."""
        (arrays,) = self.segments
        if self.is_shared:
            part = _half(arrays[0], half, start, count)
        else:
            part = slots_of(arrays[half], start, count, OWN[1])
        if half == 0:
            return self.codec.read_keys((part,), self.head_dim, *OWN).matrix
        return self.codec.read_values((part,), self.value_dim, *OWN).matrix

    @property
    def spans(self):
        """See `Storage.spans`."""
        first, spans = 0, []
        for size in segment_sizes(self.slots, self._kernels_read):
            spans.append((first, size))
            first += size
        return tuple(spans)

    def segment(self, first, size, positions, first_position=None):
        """See `Storage.segment`."""
        (arrays,) = self.segments
        return dense_segment(
            lambda start, count: self._read(0, first + start, count),
            lambda start, count: self._read(1, first + start, count),
            positions,
            self.heads,
            first_position,
            arrays if self._kernels_read else None,
            first,
        )

    def merge(self):
        """See `Storage.merge`."""
        return self

    def resize(self, slots):
        """See `Storage.resize`."""

        def cut_or_pad(array, field, first, size):
            if slots <= size:
                return slots_of(array, 0, slots, field.slots)
            widths = [[0, 0] for _ in array.shape]
            widths[field.slots][1] = slots - size
            return ops.pad(array, widths)

        return self.map(cut_or_pad)

    def decode(self):
        """See `Storage.decode`."""
        return tuple(self._read(half, 0, self.slots) for half in (0, 1))


def _half(array, half, start, count):
    """Some slots of the keys or values of an array `(B, 2, S, K, H)`."""
    batch, _, slots, heads, width = ops.shape(array)
    if count == slots:
        return array[:, half]
    place = start_of_slice((0, half, start, 0, 0))
    part = ops.slice(array, place, (batch, 1, count, heads, width))
    return part[:, 0]
