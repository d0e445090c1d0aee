"""Head-major storage: buffers of growing size that are read at memory speed."""

from dataclasses import dataclass, replace

import jax
from keras import ops

from keras_kvcache.caches.sizes import segment_sizes
from keras_kvcache.caches.storage import Field, Storage, decoded, read_slots
from keras_kvcache.ops import head_major_segment, slots_of

# Axes of the head size and of the slots. Keys have their slots last, as a product
# with few queries reads them fastest so.
KEYS = (2, 3)
VALUES = (3, 2)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False, repr=False)
class HeadMajorStorage(Storage):
    """Arrays of keys `(B, K, H, n)` and of values `(B, K, n, Hv)` in each segment."""

    heads_axis = 1

    @classmethod
    def allocate(cls, spec, slots, codec, make):
        """See `Storage.allocate`."""
        rows, heads = spec.batch_size, spec.num_key_value_heads
        head_dim, value_dim = spec.head_dim, spec.value_dim or spec.head_dim
        segments = []
        for size in segment_sizes(slots, codec.kernels_read):
            keys = (
                make((rows, heads, part.width, size // part.tokens), part.dtype)
                for part in codec.key_parts(head_dim)
            )
            values = (
                make((rows, heads, size // part.tokens, part.width), part.dtype)
                for part in codec.value_parts(value_dim)
            )
            segments.append((*keys, *values))
        return cls(tuple(segments), codec, head_dim, value_dim)

    @property
    def fields(self):
        """See `Storage.fields`."""
        keys = self.codec.key_parts(self.head_dim)
        values = self.codec.value_parts(self.value_dim)
        return (
            *(Field(KEYS[1], part.tokens) for part in keys),
            *(Field(VALUES[1], part.tokens) for part in values),
        )

    @property
    def _key_parts(self):
        return len(self.codec.key_parts(self.head_dim))

    def encode(self, key, value, codec=None):
        """See `Storage.encode`."""
        codec = codec or self.codec
        key = ops.transpose(key, (0, 2, 3, 1))
        value = ops.transpose(value, (0, 2, 1, 3))
        arrays = (
            *codec.encode_keys(key, *KEYS),
            *codec.encode_values(value, *VALUES),
        )
        return replace(self, segments=(arrays,), codec=codec)

    def regroup(self, codec):
        """The same slots with another codec for keys, and the same one for values."""
        segments = []
        for arrays in self.segments:
            keys, values = arrays[: self._key_parts], arrays[self._key_parts :]
            keys = self.codec.read_keys(keys, self.head_dim, *KEYS).matrix
            segments.append((*codec.encode_keys(keys, *KEYS), *values))
        return replace(self, segments=tuple(segments), codec=codec)

    def segment(self, first, size, positions, first_position=None):
        """See `Storage.segment`."""
        arrays = self.segments[self.spans.index((first, size))]
        fields = self.fields
        split = self._key_parts

        def read_keys(start, count):
            parts = read_slots(arrays[:split], fields[:split], start, count)
            return self.codec.read_keys(parts, self.head_dim, *KEYS)

        def read_values(start, count):
            parts = read_slots(arrays[split:], fields[split:], start, count)
            return self.codec.read_values(parts, self.value_dim, *VALUES)

        return head_major_segment(
            read_keys,
            read_values,
            positions,
            self.codec.block,
            first_position,
            arrays if self.codec.kernels_read else None,
        )

    def merge(self):
        """See `Storage.merge`."""
        return replace(self, segments=(self._copy(0, self.slots),))

    def resize(self, slots):
        """See `Storage.resize`."""
        segments, first = [], 0
        for size in segment_sizes(slots, self.codec.kernels_read):
            if (first, size) in self.spans:
                segments.append(self.segments[self.spans.index((first, size))])
            else:
                segments.append(self._copy(first, size))
            first += size
        return replace(self, segments=tuple(segments))

    def _copy(self, first, size):
        """The arrays of some slots, zeros where there are none yet."""
        copies = []
        for number, (slots, tokens) in enumerate(self.fields):
            pieces, missing = [], size
            for (begin, held), arrays in zip(self.spans, self.segments, strict=True):
                start, stop = max(first, begin), min(first + size, begin + held)
                if start < stop:
                    here, count = (start - begin) // tokens, (stop - start) // tokens
                    pieces.append(slots_of(arrays[number], here, count, slots))
                    missing -= stop - start
            if missing:
                shape = list(ops.shape(self.segments[0][number]))
                shape[slots] = missing // tokens
                pieces.append(ops.zeros(shape, self.segments[0][number].dtype))
            copies.append(ops.concatenate(pieces, axis=slots))
        return tuple(copies)

    def decode(self):
        """See `Storage.decode`."""
        split, keys, values = self._key_parts, [], []
        for arrays in self.segments:
            read = self.codec.read_keys(arrays[:split], self.head_dim, *KEYS)
            keys.append(decoded(read))
            read = self.codec.read_values(arrays[split:], self.value_dim, *VALUES)
            values.append(decoded(read))
        return (
            ops.transpose(ops.concatenate(keys, axis=KEYS[1]), (0, 3, 1, 2)),
            ops.transpose(ops.concatenate(values, axis=VALUES[1]), (0, 2, 1, 3)),
        )
