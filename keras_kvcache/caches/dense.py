"""Dense storage: the tensor that users hold in their hands."""

from dataclasses import dataclass, replace

import jax
from keras import ops

from keras_kvcache.caches.sizes import segment_sizes
from keras_kvcache.caches.storage import Field, Storage, decoded, read_slots
from keras_kvcache.ops import dense_segment, slots_of, start_of_slice

# Axes of the head size and of the slots: where keys and values share arrays
# `(B, 2, S, K, H)`, and where each have their own `(B, S, K, H)`.
SHARED = (4, 2)
OWN = (3, 1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False, repr=False)
class DenseStorage(Storage):
    """One segment, whose slots come before the heads.

    Its arrays are `(B, 2, S, K, H)`, keys at 0 and values at 1 of axis 1. Where the
    codec or the head size differ between the two they have arrays of their own,
    `(B, S, K, H)` and `(B, S, K, Hv)`. It's updated in place when compiled and
    donated, and read as it lies: at memory speed by kernels, more slowly by XLA.
    """

    @classmethod
    def allocate(cls, spec, slots, codec, make):
        """See `Storage.allocate`."""
        rows, heads = spec.batch_size, spec.num_key_value_heads
        head_dim, value_dim = spec.head_dim, spec.value_dim or spec.head_dim
        keys, values = codec.key_parts(head_dim), codec.value_parts(value_dim)
        both = (2,) if keys == values else ()
        arrays = (
            make((rows, *both, slots // part.tokens, heads, part.width), part.dtype)
            for part in (keys if both else keys + values)
        )
        return cls((tuple(arrays),), codec, head_dim, value_dim)

    @property
    def _key_parts(self):
        return self.codec.key_parts(self.head_dim)

    @property
    def _value_parts(self):
        return self.codec.value_parts(self.value_dim)

    @property
    def is_shared(self):
        """Whether keys and values share arrays."""
        return self._key_parts == self._value_parts

    @property
    def _kernels_read(self):
        return self.is_shared and self.codec.kernels_read

    @property
    def fields(self):
        """See `Storage.fields`."""
        if self.is_shared:
            return tuple(Field(SHARED[1], part.tokens) for part in self._key_parts)
        parts = self._key_parts + self._value_parts
        return tuple(Field(OWN[1], part.tokens) for part in parts)

    def encode(self, key, value, codec=None):
        """See `Storage.encode`."""
        codec = codec or self.codec
        entries = replace(self, segments=(), codec=codec)
        if entries.is_shared:
            arrays = codec.encode_keys(ops.stack([key, value], axis=1), *SHARED)
        else:
            arrays = (
                *codec.encode_keys(key, *OWN),
                *codec.encode_values(value, *OWN),
            )
        return replace(entries, segments=(arrays,))

    def regroup(self, codec):
        """See `Storage.regroup`."""
        keys, values = self._arrays()
        keys = self.codec.read_keys(keys, self.head_dim, *OWN).matrix
        arrays = (*codec.encode_keys(keys, *OWN), *values)
        return replace(self, segments=(arrays,), codec=codec)

    def _arrays(self):
        """The arrays of keys and those of values."""
        (arrays,) = self.segments
        if self.is_shared:
            return arrays, arrays
        split = len(self._key_parts)
        return arrays[:split], arrays[split:]

    def _read(self, half, start, count):
        """Some slots of keys (0) or values (1), as a `Read` of `(B, count, K, …)`."""
        arrays = self._arrays()[half]
        if self.is_shared:
            arrays = tuple(
                _half(array, half, start // part.tokens, count // part.tokens)
                for array, part in zip(arrays, self._key_parts, strict=True)
            )
        else:
            fields = tuple(
                Field(OWN[1], part.tokens)
                for part in (self._key_parts, self._value_parts)[half]
            )
            arrays = read_slots(arrays, fields, start, count)
        if half == 0:
            return self.codec.read_keys(arrays, self.head_dim, *OWN)
        return self.codec.read_values(arrays, self.value_dim, *OWN)

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
            held, wanted = size // field.tokens, slots // field.tokens
            if wanted <= held:
                return slots_of(array, 0, wanted, field.slots)
            widths = [[0, 0] for _ in array.shape]
            widths[field.slots][1] = wanted - held
            return ops.pad(array, widths)

        return self.map(cut_or_pad)

    def decode(self):
        """See `Storage.decode`."""
        reads = (self._read(half, 0, self.slots) for half in (0, 1))
        return tuple(decoded(read) for read in reads)


def _half(array, half, start, count):
    """Some slots of the keys or values of an array `(B, 2, S, K, H)`."""
    batch, _, slots, heads, width = ops.shape(array)
    if count == slots:
        return array[:, half]
    place = start_of_slice((0, half, start, 0, 0))
    part = ops.slice(array, place, (batch, 1, count, heads, width))
    return part[:, 0]
