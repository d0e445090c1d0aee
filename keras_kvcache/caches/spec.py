"""What a cache would take, before there is one."""

import numbers
from dataclasses import dataclass

import keras
from keras import ops

from keras_kvcache.caches.checks import itemsize
from keras_kvcache.caches.dense import DenseCache
from keras_kvcache.caches.static import StaticCache, segment_sizes

LAYOUTS = ("head_major", "dense")
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class CacheSpec:
    """Shape, dtype and layout of one layer's cache.

    Attributes:
        batch_size: `B`, rows.
        capacity: `S`, slots.
        num_key_value_heads: `K`.
        head_dim: `H`, size of a key head.
        value_dim: Size of a value head; `None` for `head_dim`.
        dtype: Dtype of the entries: `"float32"`, `"float16"` or `"bfloat16"`.
        layout: `"head_major"` for a `StaticCache`, `"dense"` for a `DenseCache`.

    Raises:
        ValueError: A size isn't a positive integer, or the dtype or the layout is
            unknown.
    """

    batch_size: int
    capacity: int
    num_key_value_heads: int
    head_dim: int
    value_dim: int | None = None
    dtype: str = "float32"
    layout: str = "head_major"

    def __post_init__(self):
        names = ("batch_size", "capacity", "num_key_value_heads", "head_dim")
        for name in (*names, *(["value_dim"] if self.value_dim is not None else [])):
            value = getattr(self, name)
            is_size = isinstance(value, numbers.Integral) and not isinstance(
                value, bool
            )
            if not is_size or value <= 0:
                raise ValueError(
                    f"`{name}` must be a positive integer. Received: {value!r}"
                )
        if keras.backend.standardize_dtype(self.dtype) not in DTYPES:
            raise ValueError(
                f"`dtype` must be one of {list(DTYPES)}. Received: {self.dtype!r}"
            )
        if self.layout not in LAYOUTS:
            raise ValueError(
                f"`layout` must be one of {list(LAYOUTS)}. Received: {self.layout!r}"
            )
        if self.layout == "dense" and self.value_dim not in (None, self.head_dim):
            raise ValueError(
                "A dense cache needs `value_dim` equal to `head_dim`. Received: "
                f"head_dim={self.head_dim}, value_dim={self.value_dim}"
            )

    @property
    def bytes_per_token(self):
        """Bytes that one token of one row takes."""
        both = self.head_dim + (self.value_dim or self.head_dim)
        return self.num_key_value_heads * both * itemsize(self.dtype)

    @property
    def nbytes(self):
        """Bytes that `allocate()` takes."""
        return self.batch_size * self.capacity * self.bytes_per_token

    def allocate(self):
        """An empty cache of this shape."""
        rows, heads = self.batch_size, self.num_key_value_heads
        if self.layout == "dense":
            shape = (rows, 2, self.capacity, heads, self.head_dim)
            return DenseCache(ops.zeros(shape, self.dtype))

        sizes = segment_sizes(self.capacity)
        value_dim = self.value_dim or self.head_dim
        return StaticCache(
            tuple(
                ops.zeros((rows, heads, self.head_dim, n), self.dtype) for n in sizes
            ),
            tuple(ops.zeros((rows, heads, n, value_dim), self.dtype) for n in sizes),
        )
