"""The static cache: the slot is the position."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import keras
import numpy as np
from keras import ops

from keras_kvcache.attention import View, token_positions
from keras_kvcache.attention.codecs import Exact
from keras_kvcache.attention.positions import first_positions, write_slot
from keras_kvcache.caches.cache import Cache
from keras_kvcache.caches.dense import DenseStorage
from keras_kvcache.caches.head_major import HeadMajorStorage
from keras_kvcache.caches.segmentation import whole_groups
from keras_kvcache.caches.storage import slot_positions
from keras_kvcache.runtime.concrete import concrete_value


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False, repr=False)
class StaticCache(Cache):
    """Keys and values of one layer; position `p` is kept in slot `p`.

    It takes as many positions as it has slots, or fewer if its capacity isn't a
    multiple of the codec's group.

    Attributes:
        length: Number of positions, if fewer than slots; else `None`.
    """

    length: int | None = field(default=None, metadata={"static": True})

    @classmethod
    def from_dense(cls, tensor: Any, layout: str = "head_major") -> StaticCache:
        """A cache that holds what a dense tensor holds, as it is.

        Args:
            tensor: `(B, 2, S, K, H)`, keys at 0 and values at 1 of axis 1.
            layout: `"head_major"`, or `"dense"` for the very tensor.

        Raises:
            ValueError: The tensor has another rank, or no keys or no values.
            TypeError: It doesn't hold floats.
        """
        shape = tuple(tensor.shape)
        dtype = keras.backend.standardize_dtype(tensor.dtype)
        if len(shape) != 5 or shape[1] not in (2, None):
            raise ValueError(
                "`cache` must have 5 axes, (B, 2, S, K, H), with keys and values = 2 "
                f"on axis 1. Received: shape={shape}"
            )
        if not keras.backend.is_float_dtype(dtype):
            raise TypeError(
                f"`cache` must hold floats. Received: dtype={dtype}, shape={shape}"
            )
        codec, head_dim = Exact(dtype), shape[4]
        if layout == "dense":
            return cls(DenseStorage(((tensor,),), codec, head_dim, head_dim))
        storage = HeadMajorStorage((), codec, head_dim, head_dim)
        whole = storage.encode(tensor[:, 0], tensor[:, 1])
        return cls(whole.resize(shape[2]))

    def to_dense(self) -> Any:
        """Keys and values of all slots as one tensor `(B, 2, S, K, H)`.

        Exact if the codec is.

        Raises:
            ValueError: Keys and values differ in head size.
        """
        storage = self.storage
        if storage.head_dim != storage.value_dim:
            raise ValueError(
                "A dense tensor needs keys and values of one head size. Received: "
                f"key_dim={storage.head_dim}, value_dim={storage.value_dim}"
            )
        if isinstance(storage, DenseStorage):
            if type(self.codec) is Exact:
                return storage.segments[0][0]
        both = ops.stack(storage.decode(), axis=1)[:, :, : self.capacity]
        return ops.cast(both, self.codec.dtype)

    @property
    def capacity(self) -> int:
        return self.storage.slots if self.length is None else self.length

    @property
    def max_length(self) -> int | None:
        return self.capacity

    def update(self, key: Any, value: Any, index: Any) -> tuple[Cache, View]:
        if key.shape[1] == 0:
            return self, self.view(token_positions(index, 1)[:, 0])
        slots = self.storage.slots
        slot = write_slot(index, slots)
        if self.residual is None:
            storage = self.storage.write(self.storage.encode(key, value), slot)
            fill = token_positions(index, 1)[:, 0] + ops.shape(key)[1]
            cache = StaticCache(storage)
            return cache, cache.view(fill)

        index = first_positions(slot)
        fill = self._fill(index, key.shape[1])
        residual, ahead, start = self.residual.append(
            lambda slot: self.storage.take(slot, self.codec.group),
            self.storage.encode(key, value, self.codec.residual_codec),
            index,
            fill,
        )
        # A row that brings nothing would code padding into a group that is full.
        start = ops.where(fill > index, start, slots)
        storage = self.storage.write(ahead.recode_keys(self.codec), start)
        cache = replace(self, storage=storage, residual=residual)
        return cache, cache.view(fill)

    def view(self, fill: Any = None) -> View:
        if fill is None and self.length is not None:
            fill = ops.full((1,), self.length, "int32")

        def coded_positions(*span):
            positions = slot_positions(*span)
            is_coded = positions < self.residual.start[:, None]
            return ops.where(is_coded, positions, -1)

        storage = self.storage
        if self.residual is None:
            segments = tuple(
                storage.segment(*span, slot_positions(*span), first_position=span[0])
                for span in storage.spans
            )
        else:
            segments = storage.all_segments(coded_positions)
            segments += (self.residual.segment(),)
        return View(segments, storage.heads, storage.value_dim, fill)

    def check_crop(self, fill: np.ndarray, length: np.ndarray) -> None:
        self._check_fill(fill, self.capacity)

    def resize(self, capacity: int, fill: Any) -> StaticCache:
        """The cache with another number of slots; see `keras_kvcache.caches.resize`."""
        self._check_fill(concrete_value(fill), capacity)
        slots = whole_groups(capacity, self.codec.group)
        length = None if slots == capacity else capacity
        return replace(self, storage=self.storage.resize(slots), length=length)

    def _check_fill(self, fill, capacity):
        if fill is not None and ((fill < 0) | (fill > capacity)).any():
            raise ValueError(
                "`fill` must be from 0 to the capacity. Received: "
                f"fill={fill.tolist()}, capacity={capacity}"
            )
