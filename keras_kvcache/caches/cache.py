"""The interface of every cache."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import keras
import numpy as np
from keras import ops

from keras_kvcache.attention.codecs import Codec
from keras_kvcache.attention.positions import FAR, as_int32
from keras_kvcache.attention.segments import View
from keras_kvcache.caches.residual import Residual
from keras_kvcache.caches.storage import Storage


@dataclass(frozen=True, eq=False, repr=False)
class Cache(abc.ABC):
    """Keys and values of one layer, with one verb: `update`.

    A cache is immutable: `update` gives a new one, which a compiled program that
    donates the old one writes in place. It is a JAX pytree of arrays, in all of
    which axis 0 is `B`. It doesn't know how much of it is filled: the index belongs
    to the caller, all layers share one, and rolling a cache back is passing a
    smaller index.

    Attributes:
        storage: The slots, a `Storage`, in its layout and codec.
        residual: A `Residual`, if the codec has groups; else `None`.
        end: int32 `(B,)`: entries at or past this position are dropped. `None` for
            a cache that padding doesn't harm; see `with_end`.
    """

    storage: Storage
    residual: Residual | None = None
    end: Any = None

    @property
    @abc.abstractmethod
    def capacity(self) -> int:
        """`S`, the number of slots."""

    @property
    @abc.abstractmethod
    def max_length(self) -> int | None:
        """The first position past the end; `None` if the cache never ends."""

    @property
    def codec(self) -> Codec:
        """The codec of the slots."""
        return self.storage.codec

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return nbytes(self)

    def __repr__(self):
        # Arrays are long, and Keras puts the arguments of a call in its errors.
        return (
            f"{type(self).__name__}(capacity={self.capacity}, codec={self.codec.name})"
        )

    def check(
        self, batch_size: int | None, heads: int, key_dim: int, value_dim: int
    ) -> None:
        """Refuses a cache of other sizes than an attention layer's.

        Args:
            batch_size: `B`, or `None` if unknown.
            heads: `K`.
            key_dim: `H`.
            value_dim: `Hv`.

        Raises:
            ValueError: A size differs.
        """
        arrays = self.storage.segments[0]
        for what, held, wanted in (
            ("batch size B", arrays[0].shape[0], batch_size),
            ("key/value heads K", self.storage.heads, heads),
            ("key head size H", self.storage.head_dim, key_dim),
            ("value head size", self.storage.value_dim, value_dim),
        ):
            if None not in (held, wanted) and held != wanted:
                shapes = [tuple(array.shape) for array in arrays]
                raise ValueError(
                    f"`cache` must have {what} = {wanted}. Received: {held}, in arrays "
                    f"of shape {', '.join(map(str, shapes))}"
                )

    @abc.abstractmethod
    def update(self, key: Any, value: Any, index: Any) -> tuple[Cache, View]:
        """Writes new entries, and returns what may now be attended.

        It's up to the caller to `check` sizes and to check a known index
        (`keras_kvcache.attention.normalize_index`), as `CachedMultiHeadAttention` does.

        Args:
            key: Tensor `(B, T, K, H)`.
            value: Tensor `(B, T, K, Hv)`.
            index: An int, or an integer tensor of shape `()` or `(B,)`: position
                of the first entry. What doesn't fit is dropped, and every entry
                already stored stays as it was.

        Returns:
            The pair `(cache, view)`: the new cache and a `keras_kvcache.attention.View`
            of what this very call may attend to.
        """

    @abc.abstractmethod
    def view(self, fill: Any = None) -> View:
        """The `View` for a call that only reads.

        Args:
            fill: int32 `(1,)` or `(B,)`: entries at or past this position are
                not there. `None` if every slot holds one.
        """

    @abc.abstractmethod
    def check_crop(self, fill: np.ndarray, length: np.ndarray) -> None:
        """Refuses to roll back from `fill` to `length` what is overwritten; see `crop`.

        Args:
            fill, length: Integer NumPy arrays `()` or `(B,)`.
        """

    def with_end(self, end: Any) -> Cache:
        """A cache that drops entries at or past a position when they're written.

        Prompts of unequal lengths are padded on the right. In a static cache without
        code groups, later entries overwrite padding before anything attends it. In a
        ring it would overwrite what is still attended, and in a code group it would
        widen the range of the codes.

        Args:
            end: int32 `(B,)`, or `None` for no end.
        """
        if self.end is None:
            return self
        no_end = ops.full_like(self.end, FAR)
        return replace(self, end=no_end if end is None else as_int32(end))

    def _fill(self, index, length):
        """The fill after `length` entries were written at `index`.

        Args:
            index: int32 `(1 | B,)`.
            length: `T`.

        Returns:
            int32 `(1 | B,)`; the index itself where nothing of it is to be kept.
        """
        end = self.end
        if self.max_length is not None:
            end = ops.minimum(end, self.max_length)
        fill = ops.maximum(ops.minimum(index + length, end), index)
        return ops.where(index < 0, index, fill)


def nbytes(tree: Any) -> int:
    """Bytes in memory of all arrays of a tree."""
    total = 0
    for array in jax.tree_util.tree_leaves(tree):
        dtype = jax.numpy.dtype(keras.backend.standardize_dtype(array.dtype))
        total += math.prod(array.shape) * dtype.itemsize
    return total
