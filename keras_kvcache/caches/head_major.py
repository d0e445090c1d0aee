"""Head-major storage: buffers of growing size that are read at memory speed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
from keras import ops

from keras_kvcache.attention.codecs import Codec
from keras_kvcache.attention.products import keys_of, values_of
from keras_kvcache.attention.segments import HEAD_MAJOR, Layout, slots_of
from keras_kvcache.caches.segmentation import segment_sizes
from keras_kvcache.caches.storage import Storage


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False, repr=False)
class HeadMajorStorage(Storage):
    """Arrays of keys `(B, K, H, n)` and of values `(B, K, n, Hv)` in each segment."""

    @staticmethod
    def layout_of(head_dim: int, value_dim: int) -> Layout:
        return HEAD_MAJOR

    @staticmethod
    def sizes_of(slots: int, codec: Codec) -> tuple[int, ...]:
        return segment_sizes(slots, codec.kernels_read)

    def encode(self, key: Any, value: Any, codec: Codec | None = None) -> Storage:
        codec = codec or self.codec
        key = ops.transpose(key, (0, 2, 3, 1))
        value = ops.transpose(value, (0, 2, 1, 3))
        arrays = (
            *codec.encode_keys(key, *HEAD_MAJOR.keys),
            *codec.encode_values(value, *HEAD_MAJOR.values),
        )
        return replace(self, segments=(arrays,), codec=codec)

    def recode_keys(self, codec: Codec) -> HeadMajorStorage:
        """The same slots with another codec for keys, and the same one for values."""
        segments = []
        for (first, size), arrays in zip(self.spans, self.segments, strict=True):
            keys = keys_of(self.segment(first, size, None), 0, size).matrix
            values = arrays[len(self.codec.key_arrays(self.head_dim)) :]
            segments.append((*codec.encode_keys(keys, *HEAD_MAJOR.keys), *values))
        return replace(self, segments=tuple(segments), codec=codec)

    def place_of(self, first: int, size: int) -> tuple[Sequence[Any], int]:
        return self.segments[self.spans.index((first, size))], 0

    def merge(self) -> Storage:
        return replace(self, segments=(self._copy(0, self.slots),))

    def resize(self, slots: int) -> Storage:
        segments, first = [], 0
        for size in self.sizes_of(slots, self.codec):
            if (first, size) in self.spans:
                segments.append(self.segments[self.spans.index((first, size))])
            else:
                segments.append(self._copy(first, size))
            first += size
        return replace(self, segments=tuple(segments))

    def _copy(self, first, size):
        """The arrays of some slots, zeros where there are none yet."""
        copies = []
        for number, (slots, tokens) in enumerate(self.slot_axes):
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

    def decode(self) -> tuple[Any, Any]:
        keys, values = [], []
        for first, size in self.spans:
            segment = self.segment(first, size, None)
            keys.append(keys_of(segment, 0, size).decoded())
            values.append(values_of(segment, 0, size).decoded())
        return (
            ops.transpose(ops.concatenate(keys, axis=3), (0, 3, 1, 2)),
            ops.transpose(ops.concatenate(values, axis=2), (0, 2, 1, 3)),
        )
