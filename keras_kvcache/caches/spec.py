"""The description of a cache: its sizes, dtypes and bytes, before it is allocated."""

from dataclasses import dataclass, field

import jax
import keras
from keras import ops

from keras_kvcache.attention.codecs import Codec, Exact, get_codec
from keras_kvcache.attention.positions import FAR
from keras_kvcache.caches.cache import Cache, nbytes
from keras_kvcache.caches.dense import DenseStorage
from keras_kvcache.caches.head_major import HeadMajorStorage
from keras_kvcache.caches.kinds import Rolling, Static
from keras_kvcache.caches.residual import Residual
from keras_kvcache.caches.rolling import RollingCache
from keras_kvcache.caches.segmentation import ring_slots, whole_groups
from keras_kvcache.caches.static import StaticCache
from keras_kvcache.caches.trees import as_bits
from keras_kvcache.known_names import FLOATS
from keras_kvcache.runtime.concrete import is_integer
from keras_kvcache.runtime.sharding import distribute

LAYOUTS = {"head_major": HeadMajorStorage, "dense": DenseStorage}


@dataclass(frozen=True)
class CacheSpec:
    """Shape, kind, codec and layout of one layer's cache.

    Attributes:
        batch_size: `B`, rows.
        capacity: `S`, how many positions it is to take. A rolling cache takes any
            number.
        num_key_value_heads: `K`.
        head_dim: `H`, size of a key head.
        value_dim: Size of a value head; `None` for `head_dim`.
        codec: `"float32"`, `"float16"`, `"bfloat16"` or `"float64"` for entries as
            they are, `"int8"`, `"int4"`, or a `Codec`.
        layout: `"head_major"`, or `"dense"`, slots before heads, for floats only.
        kind: `"static"`, `Static()` or a `Rolling`.

    Raises:
        ValueError: A size isn't a positive integer, or the codec, the layout or the
            kind is unknown, or a dense layout is asked for codes.
    """

    batch_size: int
    capacity: int
    num_key_value_heads: int
    head_dim: int
    value_dim: int | None = None
    codec: str | Codec = "float32"
    layout: str = "head_major"
    kind: str | Static | Rolling = field(default_factory=Static)

    def __post_init__(self):
        names = ("batch_size", "capacity", "num_key_value_heads", "head_dim")
        for name in (*names, *(["value_dim"] if self.value_dim is not None else [])):
            value = getattr(self, name)
            if not is_integer(value) or value <= 0:
                raise ValueError(
                    f"`{name}` must be a positive integer. Received: {value!r}"
                )
        object.__setattr__(self, "codec", get_codec(self.codec))
        if self.layout not in LAYOUTS:
            raise ValueError(
                f"`layout` must be one of {list(LAYOUTS)}. Received: {self.layout!r}"
            )
        if self.layout == "dense" and not self.codec.is_exact:
            raise ValueError(
                f"`layout` must be 'head_major' for the codec {self.codec.name!r}: a "
                f"dense cache keeps entries as they are ({', '.join(FLOATS)}). "
                f"Received: layout='dense', codec={self.codec.name!r}"
            )
        if self.kind == Static.name:
            object.__setattr__(self, "kind", Static())
        if not isinstance(self.kind, (Static, Rolling)):
            raise ValueError(
                "`kind` must be 'static', Static() or Rolling(window=…). Received: "
                f"{self.kind!r}"
            )

    @property
    def bytes_per_token(self) -> float:
        """Bytes of one token of one row, with its share of what a group shares."""
        arrays = [
            *self.codec.key_arrays(self.head_dim),
            *self.codec.value_arrays(self.value_dim or self.head_dim),
        ]
        each = (
            coded.width * jax.numpy.dtype(coded.dtype).itemsize / coded.tokens
            for coded in arrays
        )
        return self.num_key_value_heads * sum(each)

    @property
    def bytes_per_row(self) -> int:
        """Bytes that one row takes in all."""
        return self.nbytes // self.batch_size

    @property
    def nbytes(self) -> int:
        """Bytes that `allocate()` takes."""
        return nbytes(self.shapes())

    def shapes(self) -> Cache:
        """The cache with a `jax.ShapeDtypeStruct` in the place of each array."""
        return self._make(lambda shape, dtype, *_: jax.ShapeDtypeStruct(shape, dtype))

    def allocate(self) -> Cache:
        """An empty cache of this shape, on the devices of `keras.distribution`.

        Under JAX on a CPU narrow floats are held as whole numbers of their bits, which
        XLA writes in place there.

        Raises:
            ValueError: The backend has no numbers of the codec's dtype.
        """

        def make(shape, dtype, heads_axis=None):
            array = ops.zeros(shape, dtype)
            held = keras.backend.standardize_dtype(array.dtype)
            if held != dtype:
                raise ValueError(
                    "`codec` must be of a dtype that the backend has. Received: "
                    f"{dtype}, which becomes {held}"
                )
            return distribute(array, heads_axis)

        return as_bits(self._make(make))

    def _make(self, make):
        """The cache of arrays that `make(shape, dtype, heads_axis=None)` gives."""
        codec, kind, layout = self.codec, self.kind, LAYOUTS[self.layout]
        is_static = isinstance(kind, Static)
        if is_static:
            slots = whole_groups(self.capacity, codec.group)
        else:
            slots = ring_slots(kind.window, codec.group)
        residual = end = None
        if codec.group > 1:
            group = layout.allocate(self, codec.group, codec.residual_codec, make)
            residual = Residual(group, make((self.batch_size,), "int32"))
        if codec.group > 1 or not is_static:
            end = make((self.batch_size,), "int32")
            end = end if isinstance(end, jax.ShapeDtypeStruct) else end + FAR
        storage = layout.allocate(self, slots, codec, make)
        if is_static:
            length = None if slots == self.capacity else self.capacity
            return StaticCache(storage, residual, end, length)
        sinks = None
        if kind.sinks:
            sinks = layout.allocate(self, kind.sinks, Exact(codec.dtype), make)
        return RollingCache(storage, residual, end, sinks, kind.window)
