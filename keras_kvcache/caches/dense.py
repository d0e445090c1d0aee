"""Dense storage: the tensor that users hold in their hands."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
from keras import ops

from keras_kvcache.attention.codecs import Codec
from keras_kvcache.attention.products import keys_of, values_of
from keras_kvcache.attention.segments import DENSE, DENSE_PAIR, Layout, slots_of
from keras_kvcache.caches.segmentation import segment_sizes
from keras_kvcache.caches.storage import Storage


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False, repr=False)
class DenseStorage(Storage):
    """One segment of exact entries, whose slots come before the heads.

    Its array is `(B, 2, S, K, H)`, keys at 0 and values at 1 of axis 1. Values of
    another head size have an array of their own: then keys are `(B, S, K, H)` and
    values `(B, S, K, Hv)`. It's updated in place when compiled and donated, and read as
    it lies: at memory speed by kernels, more slowly by XLA.
    """

    @staticmethod
    def layout_of(head_dim: int, value_dim: int) -> Layout:
        return DENSE if head_dim == value_dim else DENSE_PAIR

    def encode(self, key: Any, value: Any, codec: Codec | None = None) -> Storage:
        if self.layout.is_one_tensor:
            both = ops.stack([key, value], axis=1)
            arrays = self.codec.encode_keys(both, *DENSE.keys)
        else:
            keys = self.codec.encode_keys(key, *DENSE_PAIR.keys)
            arrays = (*keys, *self.codec.encode_values(value, *DENSE_PAIR.values))
        return replace(self, segments=(arrays,))

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        first, spans = 0, []
        kernels_read = self.layout.is_one_tensor and self.codec.kernels_read
        for size in segment_sizes(self.slots, kernels_read):
            spans.append((first, size))
            first += size
        return tuple(spans)

    def place_of(self, first: int, size: int) -> tuple[Sequence[Any], int]:
        return self.segments[0], first

    def merge(self) -> Storage:
        return self

    def resize(self, slots: int) -> Storage:

        def cut_or_pad(array, axis, first, size):
            if slots <= size:
                return slots_of(array, 0, slots, axis.slots)
            widths = [[0, 0] for _ in array.shape]
            widths[axis.slots][1] = slots - size
            return ops.pad(array, widths)

        return self.map(cut_or_pad)

    def decode(self) -> tuple[Any, Any]:
        segment = self.segment(0, self.slots, None)
        return (
            keys_of(segment, 0, self.slots).matrix,
            values_of(segment, 0, self.slots).matrix,
        )
