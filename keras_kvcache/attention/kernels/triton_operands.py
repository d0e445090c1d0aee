"""Operands of the kernel for GPUs: the tiles that its programs load and multiply."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from keras_kvcache.attention.segments import Layout

# The least size of a matrix that a matrix unit multiplies.
LEAST = 16


def load(ref: Any, place: tuple[Any, ...], is_there: Any) -> Any:
    """Loads numbers of an array; 0 where `is_there` is false."""
    from jax.experimental.pallas import triton

    return triton.load(ref.at[place], mask=is_there, other=jnp.zeros((), ref.dtype))


def store(ref: Any, place: tuple[Any, ...], value: Any, is_there: Any) -> None:
    """Stores numbers in an array where `is_there` is true."""
    from jax.experimental.pallas import triton

    triton.store(ref.at[place], value, mask=is_there)


def dot(x: Any, y: Any) -> Any:
    """A product summed in float32, of float32 factors in full precision."""
    return jax.lax.dot(x, y, precision="highest", preferred_element_type=jnp.float32)


def dot_of_weighed(weights: Any, values: Any) -> Any:
    """`dot` in which infinite values and NaN of weight 0 add nothing.

    A query with another weight for one gets NaN.
    """
    is_finite = jnp.abs(values) < jnp.inf
    is_infinite = jnp.max(1 - is_finite.astype(jnp.int32), axis=1)
    is_weighed = (weights != 0).astype(jnp.int32)
    is_spoilt = jnp.max(is_weighed * is_infinite[None, :], axis=1) > 0
    finite = dot(weights, jnp.where(is_finite, values, 0).astype(values.dtype))
    return jnp.where(is_spoilt[:, None], jnp.nan, finite)


def divide(number: Any, by: int) -> tuple[Any, Any]:
    """Quotient and remainder of an int32 >= 0, int32 even with `jax_enable_x64`."""
    by = jnp.int32(by)
    return jax.lax.div(number, by), jax.lax.rem(number, by)


def padded_range(size: int) -> Any:
    """`arange(size)`, padded to the power of two that a tile needs."""
    return jnp.arange(padded_size(size), dtype=jnp.int32)


def padded_size(size: int) -> int:
    """The size of a tile's axis: a power of two that isn't below `size`."""
    return max(LEAST, 1 << (size - 1).bit_length())


class Sizes(NamedTuple):
    """Sizes of the operands that the kernel is compiled for."""

    queries: int  # R
    head_dim: int  # H
    value_dim: int  # Hv
    length: int  # T


class Queries(NamedTuple):
    """The queries of a program."""

    row: jax.Array
    head: jax.Array  # of keys and values
    numbers: jax.Array  # among the R of a head

    def heads_and_tokens(self, sizes: Sizes) -> tuple[Any, Any]:
        """The query head and the token of each query."""
        of_group, token = divide(self.numbers, sizes.length)
        return self.head * (sizes.queries // sizes.length) + of_group, token


class Bias(NamedTuple):
    """The bias of the scores of one row and head."""

    table: Any  # (N, distances)
    query_positions: Any  # (1 | B, T)
    slot_positions: Any  # (1 | B, n)
    queries: Queries

    def of(self, slots: Any, sizes: Sizes) -> Any:
        """The bias of some slots, `(queries, slots)`."""
        head, token = self.queries.heads_and_tokens(sizes)
        rows, _ = self.query_positions.shape
        row = own(self.queries.row, rows)
        query = load(self.query_positions, (row, token), token >= 0)
        rows, count = self.slot_positions.shape
        row, is_there = own(self.queries.row, rows), slots < count
        slot = load(self.slot_positions, (row, slots), is_there)
        farthest = self.table.shape[1] - 1
        distance = jnp.maximum(query[:, None] - slot[None, :], 0)
        distance = jnp.minimum(distance, farthest)
        return load(self.table, (head[:, None], distance), is_there[None, :])


class Mask(NamedTuple):
    """Which slots the queries of one row and head attend."""

    ref: Any  # (1 | B, 1 | N, 1 | T, n)
    queries: Queries

    @property
    def is_one_mask(self) -> bool:
        """Whether all queries attend the same slots."""
        return self.ref.shape[1] == self.ref.shape[2] == 1

    def of(self, slots: Any, sizes: Sizes) -> Any:
        """The mask of some slots, `(1 | queries, slots)`."""
        batch, heads, length, count = self.ref.shape
        queries = self.queries
        if self.is_one_mask:
            queries = queries._replace(numbers=jnp.zeros(1, jnp.int32))
        head, token = queries.heads_and_tokens(sizes)
        place = (
            own(queries.row, batch),
            own(head[:, None], heads),
            own(token[:, None], length),
            slots[None, :],
        )
        return load(self.ref, place, (slots < count)[None, :])


class Slots(NamedTuple):
    """The slots of one row and head of a `Segment`."""

    refs: list  # of its arrays
    row: jax.Array
    head: jax.Array
    layout: Layout
    offset: int  # the segment's first slot in the arrays
    count: int

    @property
    def has_scales(self) -> bool:
        """Whether keys and values are each followed by a scale for each slot."""
        return len(self.refs) == 4

    def keys(self, slots: Any, features: Any, size: int) -> Any:
        """Keys `(H, tile)`; zeros past the sizes."""
        is_there = (features < size)[:, None] & (slots < self.count)[None, :]
        return self._load(0, slots[None, :], features[:, None], is_there)

    def values(self, slots: Any, features: Any, size: int, is_read: Any) -> Any:
        """Values `(tile, Hv)`; zeros past the size and where none is read."""
        is_there = is_read[:, None] & (features < size)[None, :]
        return self._load(1, slots[:, None], features[None, :], is_there)

    def scales(self, half: int, slots: Any, is_read: Any) -> Any:
        """The scales `(tile,)` of keys or of values; zeros where none is read."""
        return self._load(half, slots, jnp.zeros_like(slots), is_read, scales=True)

    def _load(self, half, slots, features, is_there, scales=False):
        """Numbers of keys (`half` 0) or values (1), zeros where they aren't there."""
        if self.layout.is_one_tensor:
            place = (self.row, half, self.offset + slots, self.head, features)
            return load(self.refs[0], place, is_there)
        ref = self.refs[half * len(self.refs) // 2 + scales]
        order = (features, slots) if half == 0 else (slots, features)
        return load(ref, (self.row, self.head, *order), is_there)


def own(number: Any, count: int) -> Any:
    """The index on an axis that may be broadcast: 0 if its size is 1."""
    return number if count > 1 else number * 0
