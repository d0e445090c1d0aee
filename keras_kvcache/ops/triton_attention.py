"""Attention of few queries over the slots of caches, by a kernel for NVIDIA's GPUs.

XLA's GPU backend waits for the device wherever a program branches, so skipping what is
hidden by conditionals, segment by segment, costs more than reading. The kernel looks
itself how far a row is filled. Its programs share out the slots of each row and head,
and what they make of their parts is merged by maxima and sums, as in flash decoding
(Dao et al., 2023, https://pytorch.org/blog/flash-decoding/). It is written in Pallas
and compiled by Triton, which JAX brings along.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from keras_kvcache.ops.online_softmax import NOTHING_SEEN, group_mask_heads
from keras_kvcache.ops.softmax import LOWEST

# As many programs keep all multiprocessors of the largest GPUs busy.
PROGRAMS = 1024

# The fewest slots that are worth a program.
PART = 256

# Numbers of a tile of keys or values: with three of each on the way, what two
# programs on one multiprocessor have room for.
TILE = 8192

# The most queries of one key/value head that a program keeps in its registers.
MOST_QUERIES = 64

# A matrix unit's least rows and columns.
LEAST = 16


class Tiling(NamedTuple):
    """How the slots of a segment are shared out."""

    parts: int  # programs for each row and head
    part: int  # slots of a program, a multiple of `tile`
    tile: int  # slots that are read at a time, a power of two


def suits_triton(query, arrays):
    """Whether the kernel takes queries `(B, K, R, H)` and these arrays of segments."""
    # Pallas counts past 2³¹ where there are more than 2³² bytes, not at once.
    reached = (array.size < 2**31 or array.dtype.itemsize > 1 for array in arrays)
    return query.shape[2] <= MOST_QUERIES and all(reached)


def choose_tiling(rows_and_heads, slots, head_dim, dtype):
    """The `Tiling` of `slots` slots for `B·K` rows and heads."""
    numbers = TILE * 2 // max(2, jnp.dtype(dtype).itemsize)
    tile = max(LEAST, numbers // _padded(head_dim))
    parts = min(pl.cdiv(slots, PART), max(1, PROGRAMS // rows_and_heads))
    part = pl.cdiv(pl.cdiv(slots, parts), tile) * tile
    return Tiling(pl.cdiv(slots, part), part, tile)


def attend_by_triton(query, segments, length, value_dim, soft_cap, interpret=False):
    """Attention as by `attend_segments`, of queries scaled and grouped.

    Args:
        query: `(B, K, R, H)`, `R = G·T`.
        segments: Pairs of the arrays of a `Segment` with the number of its first slot
            in them, and of its mask, boolean `(1 | B, 1 | N, 1 | T, n)`.
        length: `T`.
        value_dim: `Hv`.
        soft_cap: As in `attend`.
        interpret: Whether JAX interprets the kernel, which runs anywhere.

    Returns:
        float32 `(B, K, R, Hv)`; zero for a query with nothing to attend.
    """
    partials = []
    for arrays, start, mask in segments:
        if mask.shape[1] > 1 or mask.shape[2] > 1:
            mask = group_mask_heads(mask, query, length)
        partials.append(
            _attend_parts(query, arrays, start, mask, value_dim, soft_cap, interpret)
        )
    maximum, total, output = (
        jnp.concatenate(part, axis=2) for part in zip(*partials, strict=True)
    )
    weight = jnp.exp(maximum - jnp.max(maximum, axis=2, keepdims=True))
    total = jnp.sum(total * weight, axis=2)[..., None]
    output = jnp.sum(output * weight[..., None], axis=2)
    return output / jnp.where(total > 0, total, 1)


def _attend_parts(query, arrays, start, mask, value_dim, soft_cap, interpret):
    """Maxima and sums `(B, K, P, R)`, outputs `(B, K, P, R, Hv)` of `P` parts."""
    from jax.experimental.pallas import triton

    batch, heads, rows, head_dim = query.shape
    slots = mask.shape[3]
    tiling = choose_tiling(
        batch * heads, slots, max(head_dim, value_dim), arrays[0].dtype
    )
    kernel = functools.partial(
        _kernel,
        sizes=(rows, head_dim, value_dim, slots),
        tiling=tiling,
        start=start,
        soft_cap=soft_cap,
    )
    shape = (batch, heads, tiling.parts, rows)
    call = pl.pallas_call(
        kernel,
        grid=(tiling.parts, heads, batch),
        out_shape=[
            jax.ShapeDtypeStruct(shape, jnp.float32),
            jax.ShapeDtypeStruct(shape, jnp.float32),
            jax.ShapeDtypeStruct((*shape, value_dim), jnp.float32),
        ],
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="decode_attention",
    )
    return call(query, _ends(mask), mask, *arrays)


def _ends(mask):
    """The first slot that a row attends and that past its last, int32 `(1 | B, 2)`."""
    seen = jnp.any(mask, axis=(1, 2))
    slots = jnp.arange(seen.shape[1], dtype=jnp.int32)
    first = jnp.min(jnp.where(seen, slots, seen.shape[1]), axis=1)
    end = jnp.max(jnp.where(seen, slots + 1, 0), axis=1)
    return jnp.stack([first, end], axis=1)


def _kernel(query_ref, ends_ref, mask_ref, *refs, sizes, tiling, start, soft_cap):
    """One part of the slots of a row and head, by online softmax over tiles."""
    *slot_refs, maximum_ref, total_ref, output_ref = refs
    rows, head_dim, value_dim, count = sizes
    part, head, row = (pl.program_id(axis) for axis in range(3))
    segment = _Slots(slot_refs, row, head, start, count)
    queries, features, value_features = (
        jnp.arange(max(LEAST, _padded(size))) for size in sizes[:3]
    )
    is_query = queries < rows
    query = _load(
        query_ref,
        (row, head, queries[:, None], features[None, :]),
        is_query[:, None] & (features < head_dim)[None, :],
    )
    # A query that only fills the tile attends what the last one does.
    mask_rows = jnp.minimum(queries, rows - 1)
    dtype = segment.dtype(query)
    query = query.astype(dtype)

    def add_tile(number, running):
        maximum, total, output = running
        slots = number * tiling.tile + jnp.arange(tiling.tile)
        # Rows of queries that aren't there see what is there for the others.
        seen = _load_mask(mask_ref, row, head, mask_rows, slots, count)
        # Values that nobody attends may be infinite: they aren't weighed, even by 0.
        is_read = jnp.max(seen.astype(jnp.int32), axis=0) > 0
        keys = segment.keys(slots, features, head_dim)
        scores = _dot(query, keys.astype(dtype))
        if segment.has_scales:
            scores *= segment.scales(0, slots, is_read)[None, :]
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        scores = jnp.where(seen, scores, LOWEST)
        new_maximum = jnp.maximum(maximum, jnp.max(scores, axis=1))
        keep = jnp.exp(maximum - new_maximum)
        weights = jnp.exp(scores - new_maximum[:, None])
        total = total * keep + jnp.sum(weights, axis=1)
        if segment.has_scales:
            weights *= segment.scales(1, slots, is_read)[None, :]
        values = segment.values(slots, value_features, value_dim, is_read)
        mixed = _dot(weights.astype(dtype), values.astype(dtype))
        return new_maximum, total, output * keep[:, None] + mixed

    row_ends = _own(row, ends_ref.shape[0])
    first = jnp.maximum(ends_ref[row_ends, 0], part * tiling.part)
    end = jnp.minimum(ends_ref[row_ends, 1], (part + 1) * tiling.part)
    running = (
        jnp.full(queries.shape, NOTHING_SEEN, jnp.float32),
        jnp.zeros(queries.shape, jnp.float32),
        jnp.zeros((queries.size, value_features.size), jnp.float32),
    )
    maximum, total, output = jax.lax.fori_loop(
        first // tiling.tile, pl.cdiv(end, tiling.tile), add_tile, running
    )
    place = (row, head, part, queries)
    _store(maximum_ref, place, maximum, is_query)
    _store(total_ref, place, total, is_query)
    _store(
        output_ref,
        (row, head, part, queries[:, None], value_features[None, :]),
        output,
        is_query[:, None] & (value_features < value_dim)[None, :],
    )


class _Slots(NamedTuple):
    """The slots of one row and head, in any of the forms of `Segment.arrays`."""

    refs: list  # of the arrays
    row: jax.Array
    head: jax.Array
    start: int  # the segment's first slot in the arrays
    count: int

    @property
    def is_dense(self):
        """Whether keys and values are in one tensor."""
        return len(self.refs[0].shape) == 5

    @property
    def has_scales(self):
        """Whether numbers are codes, with a scale for each slot."""
        return self.refs[0].dtype == jnp.int8

    def dtype(self, query):
        """What products are made in: as narrow as both operands allow."""
        slots = query.dtype if self.has_scales else self.refs[0].dtype
        return jnp.promote_types(query.dtype, slots)

    def keys(self, slots, features, size):
        """Keys `(H, tile)`; zeros past the sizes."""
        is_there = (features < size)[:, None] & (slots < self.count)[None, :]
        return self._load(0, slots[None, :], features[:, None], is_there)

    def values(self, slots, features, size, is_read):
        """Values `(tile, Hv)`; zeros past the size and where none is read."""
        is_there = is_read[:, None] & (features < size)[None, :]
        return self._load(1, slots[:, None], features[None, :], is_there)

    def scales(self, half, slots, is_read):
        """The scales `(tile,)` of keys or of values; zeros where none is read."""
        return self._load(half, slots, jnp.zeros_like(slots), is_read, scales=True)

    def _load(self, half, slots, features, is_there, scales=False):
        """Numbers of keys (`half` 0) or values (1), zeros where they aren't there."""
        each = len(self.refs) if self.is_dense else len(self.refs) // 2
        first = 0 if self.is_dense else half * each
        ref = self.refs[first + scales]
        if self.is_dense:
            place = (self.row, half, self.start + slots, self.head, features)
        elif half == 0:
            place = (self.row, self.head, features, slots)
        else:
            place = (self.row, self.head, slots, features)
        return _load(ref, place, is_there)


def _load_mask(ref, row, head, queries, slots, count):
    """Which slots each query attends, `(1 | R, tile)`."""
    rows, heads, length, _ = ref.shape
    queries = queries if length > 1 else jnp.zeros(1, jnp.int32)
    place = (_own(row, rows), _own(head, heads), queries[:, None], slots[None, :])
    return _load(ref, place, (slots < count)[None, :])


def _own(number, count):
    """The number, or 0 where there is one for all."""
    return number if count > 1 else 0


def _load(ref, place, is_there):
    from jax.experimental.pallas import triton

    return triton.load(ref.at[place], mask=is_there, other=jnp.zeros((), ref.dtype))


def _store(ref, place, value, is_there):
    from jax.experimental.pallas import triton

    triton.store(ref.at[place], value, mask=is_there)


def _dot(x, y):
    """A product summed in float32, of float32 factors in full precision."""
    return jax.lax.dot(x, y, precision="highest", preferred_element_type=jnp.float32)


def _padded(size):
    """The least power of two that isn't below the size; tiles have such sizes."""
    return 1 << (size - 1).bit_length()
