"""Attention over the slots of caches, by a kernel for NVIDIA's GPUs.

XLA's GPU backend lets the host wait for the device wherever a program branches, so
skipping what is hidden by conditionals, segment by segment, costs more than reading.
The kernel looks itself how far a row is filled. Its programs share out the slots of
each row and head, and what they make of their parts is merged by maxima and sums, as
in flash decoding (Dao et al., 2023, https://pytorch.org/blog/flash-decoding/). It is
written in Pallas and compiled by Triton, which JAX brings along. JAX 0.11 deprecates
Triton in Pallas. To replace it, write the same kernel in Triton's own language and call
it by the package `jax-triton`, or write it in Pallas for Mosaic GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from keras_kvcache.attention.kernels.triton_operands import (
    LEAST,
    Bias,
    Mask,
    Queries,
    Sizes,
    Slots,
    divide,
    dot,
    dot_of_weighed,
    load,
    own,
    padded_range,
    padded_size,
    store,
)
from keras_kvcache.attention.masks import whole_mask
from keras_kvcache.attention.scoring import Scoring
from keras_kvcache.attention.segments import Segment
from keras_kvcache.attention.softmax import LOWEST, NOTHING_SEEN

# As many programs keep all multiprocessors of the largest GPUs busy.
PROGRAMS = 1024

# The fewest slots that are worth a program.
PART = 256

# Bytes of a tile of keys or values. Three of each are on their way at a time, in the
# 99 KB that a program may have on the smaller GPUs.
TILE = 2**14

# The most queries of a program, and the most numbers of their sums: all that stays in
# registers. float32 is multiplied in registers, too, so that only few queries fit.
QUERIES = 64
SUMS = 2**13

# The largest heads of which tiles are small enough.
LARGEST_HEAD = 256


class Tiling(NamedTuple):
    """How queries and slots of a segment are divided among programs."""

    groups: int  # of queries of one key/value head
    queries: int  # of a group, a power of two
    parts: int  # of slots
    part: int  # slots of one, a multiple of `tile`
    tile: int  # slots that are read at a time, a power of two


def choose_tiling(
    heads: int, queries: int, slots: int, head_dim: int, dtype: Any
) -> Tiling:
    """Divides queries and slots among the kernel's programs.

    Args:
        heads: `B·K`.
        queries: `R`, those of each key/value head.
        slots: How many the segment has.
        head_dim: The larger of `H` and `Hv`.
        dtype: What products are made in.

    Returns:
        A `Tiling`.
    """
    nbytes, head_dim = jnp.dtype(dtype).itemsize, padded_size(head_dim)
    most = min(QUERIES, SUMS // head_dim) if nbytes == 2 else LEAST
    each = min(most, padded_size(queries))
    groups = pl.cdiv(queries, each)
    # Many queries take room, too.
    tile = max(LEAST, TILE // nbytes // head_dim // (1 if each == LEAST else 2))
    parts = max(1, min(slots // PART, PROGRAMS // (heads * groups)))
    part = pl.cdiv(pl.cdiv(slots, parts), tile) * tile
    return Tiling(groups, each, pl.cdiv(slots, part), part, tile)


def product_dtype(query: Any, slots: Any) -> Any:
    """The dtype in which queries and slots are multiplied, as narrow as both allow."""
    return query if slots == jnp.int8 else jnp.promote_types(query, slots)


def suits_triton(query: Any, arrays: Sequence[Any], value_dim: int) -> bool:
    """Whether the kernel takes queries `(B, K, R, H)` with these arrays and masks."""
    # Pallas counts past 2³¹ where there are more than 2³² bytes, not at once.
    reaches = all(array.size < 2**31 or array.dtype.itemsize > 1 for array in arrays)
    return reaches and max(query.shape[3], value_dim) <= LARGEST_HEAD


def attend_by_triton(
    query: Any,
    segments: Sequence[Segment],
    masks: Sequence[Any],
    length: int,
    scoring: Scoring,
    positions: Any,
    interpret: bool = False,
) -> Any:
    """Attention as by `attend_segments`, of queries scaled and grouped.

    Args:
        query: `(B, K, R, H)`, `R = G·T`.
        segments, masks, length, scoring, positions: As there.
        interpret: Whether JAX interprets the kernel, which runs anywhere.

    Returns:
        float32 `(B, K, R, Hv)`, rounded to the dtype of the queries; zero for a query
        with nothing to attend.
    """
    sizes = Sizes(*query.shape[2:], segments[0].value_dim, length)
    partials = [
        _attend_parts(query, segment, mask, sizes, scoring, positions, interpret)
        for segment, mask in zip(segments, masks, strict=True)
    ]
    if scoring.sink is not None:
        partials.append(_sink_part(query, scoring.sink, sizes))
    partials = [jnp.concatenate(part, axis=2) for part in zip(*partials, strict=True)]
    # Layers make it as narrow as the queries; the casts there and back cancel out.
    return _merge_parts(*partials, query.dtype, interpret).astype(jnp.float32)


def _sink_part(query, sink, sizes):
    """The sink as one more part, which has a weight and no value."""
    batch, heads, queries, _ = query.shape
    maximum = jnp.reshape(jnp.float32(sink), (1, heads, 1, queries // sizes.length, 1))
    maximum = jnp.broadcast_to(maximum, (batch, *maximum.shape[1:4], sizes.length))
    maximum = jnp.reshape(maximum, (batch, heads, 1, queries))
    output = jnp.zeros((*maximum.shape, sizes.value_dim), jnp.float32)
    return maximum, jnp.ones_like(maximum), output


def _attend_parts(query, segment, mask, sizes, scoring, positions, interpret):
    """Attends `P` parts: maxima, sums `(B, K, P, R)` and outputs `(B, K, P, R, Hv)`."""
    from jax.experimental.pallas import triton

    batch, heads, queries, _ = query.shape
    mask = whole_mask(segment, mask)
    # Some hold the bits of narrow floats.
    dtype = segment.codec.dtype
    arrays = [a.view(dtype) if a.dtype == "int16" else a for a in segment.arrays]
    tiling = choose_tiling(
        batch * heads,
        queries,
        mask.shape[3],
        max(sizes.head_dim, sizes.value_dim),
        product_dtype(query.dtype, arrays[0].dtype),
    )
    bias = ()
    if scoring.bias is not None:
        bias = (scoring.bias, positions, segment.positions)
    kernel = functools.partial(
        _kernel,
        sizes=sizes,
        tiling=tiling,
        layout=segment.layout,
        offset=segment.array_offset,
        soft_cap=scoring.soft_cap,
        has_bias=scoring.bias is not None,
    )
    shape = (batch, heads, tiling.parts, queries)
    call = pl.pallas_call(
        kernel,
        grid=(tiling.parts, heads * tiling.groups, batch),
        out_shape=[
            jax.ShapeDtypeStruct(shape, jnp.float32),
            jax.ShapeDtypeStruct(shape, jnp.float32),
            jax.ShapeDtypeStruct((*shape, sizes.value_dim), jnp.float32),
        ],
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="decode_attention",
    )
    return call(query, _ends(mask), mask, *bias, *arrays)


def _ends(mask):
    """First slot that a row attends and end of its last, int32 `(1 | B, 2)`."""
    seen = jnp.any(mask, axis=(1, 2))
    slots = jnp.arange(seen.shape[1], dtype=jnp.int32)
    first = jnp.min(jnp.where(seen, slots, seen.shape[1]), axis=1)
    end = jnp.max(jnp.where(seen, slots + 1, 0), axis=1)
    return jnp.stack([first, end], axis=1)


def _kernel(
    query_ref,
    ends_ref,
    mask_ref,
    *refs,
    sizes,
    tiling,
    layout,
    offset,
    soft_cap,
    has_bias,
):
    """The kernel: queries of a row and head attend one part of the slots, by tiles."""
    *bias_refs, maximum_ref, total_ref, output_ref = refs
    bias_refs, slot_refs = bias_refs[: 3 * has_bias], bias_refs[3 * has_bias :]
    part, head_and_group, row = (pl.program_id(axis) for axis in range(3))
    head, group = divide(head_and_group, tiling.groups)
    segment = Slots(slot_refs, row, head, layout, offset, mask_ref.shape[3])
    queries = group * tiling.queries + padded_range(tiling.queries)
    features, value_features = (
        padded_range(sizes.head_dim),
        padded_range(sizes.value_dim),
    )

    is_query = queries < sizes.queries
    query = load(
        query_ref,
        (row, head, queries[:, None], features[None, :]),
        is_query[:, None] & (features < sizes.head_dim)[None, :],
    )
    dtype = product_dtype(query.dtype, slot_refs[0].dtype)
    query = query.astype(dtype)
    own_queries = Queries(row, head, jnp.minimum(queries, sizes.queries - 1))
    mask = Mask(mask_ref, own_queries)
    bias = Bias(*bias_refs, own_queries) if has_bias else None

    def add_tile(number, running):
        maximum, total, output = running
        slots = number * tiling.tile + padded_range(tiling.tile)
        seen = mask.of(slots, sizes)
        # Values that no query of this program attends may be infinite: they aren't
        # even multiplied by 0.
        is_read = jnp.max(seen.astype(jnp.int32), axis=0) > 0
        keys = segment.keys(slots, features, sizes.head_dim)
        scores = dot(query, keys.astype(dtype))
        if segment.has_scales:
            scores *= segment.scales(0, slots, is_read)[None, :]
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        if has_bias:
            scores += bias.of(slots, sizes)
        scores = jnp.where(seen, scores, LOWEST)
        new_maximum = jnp.maximum(maximum, jnp.max(scores, axis=1))
        keep = jnp.exp(maximum - new_maximum)
        weights = jnp.exp(scores - new_maximum[:, None])
        total = total * keep + jnp.sum(weights, axis=1)
        if segment.has_scales:
            scaled = weights * segment.scales(1, slots, is_read)[None, :]
            weights = jnp.where(weights == 0, weights, scaled)
        values = segment.values(slots, value_features, sizes.value_dim, is_read)
        mix = dot if mask.is_one_mask else dot_of_weighed
        mixed = mix(weights.astype(dtype), values.astype(dtype))
        return new_maximum, total, output * keep[:, None] + mixed

    row_ends = own(row, ends_ref.shape[0])
    first = jnp.maximum(ends_ref[row_ends, 0], part * tiling.part)
    end = jnp.minimum(ends_ref[row_ends, 1], (part + 1) * tiling.part)
    running = (
        jnp.full(queries.shape, NOTHING_SEEN, jnp.float32),
        jnp.zeros(queries.shape, jnp.float32),
        jnp.zeros((queries.size, value_features.size), jnp.float32),
    )
    first, _ = divide(first, tiling.tile)
    end, _ = divide(end + tiling.tile - 1, tiling.tile)
    maximum, total, output = jax.lax.fori_loop(first, end, add_tile, running)
    place = (row, head, part, queries)
    store(maximum_ref, place, maximum, is_query)
    store(total_ref, place, total, is_query)
    store(
        output_ref,
        (row, head, part, queries[:, None], value_features[None, :]),
        output,
        is_query[:, None] & (value_features < sizes.value_dim)[None, :],
    )


def _merge_parts(maximum, total, output, dtype, interpret):
    """Merges the results of `_attend_parts` to an output `(B, K, R, Hv)`.

    One kernel, of which XLA would make four.
    """
    from jax.experimental.pallas import triton

    batch, heads, parts, queries, value_dim = output.shape
    if parts == 1:
        total = total[:, :, 0, :, None]
        return (output[:, :, 0] / jnp.where(total > 0, total, 1)).astype(dtype)
    call = pl.pallas_call(
        _merge_parts_kernel,
        grid=(queries, heads, batch),
        out_shape=jax.ShapeDtypeStruct((batch, heads, queries, value_dim), dtype),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="merge_parts",
    )
    return call(maximum, total, output)


def _merge_parts_kernel(maximum_ref, total_ref, output_ref, merged_ref):
    """The kernel: merges one query of a row and head, some parts at a time."""
    query, head, row = (pl.program_id(axis) for axis in range(3))
    _, _, count, _, value_dim = output_ref.shape
    features = padded_range(value_dim)
    is_feature = features < value_dim
    tile = min(padded_size(count), SUMS // features.size)

    def add_parts(number, running):
        maximum, total, output = running
        parts = number * tile + jnp.arange(tile, dtype=jnp.int32)
        is_part = parts < count
        place = (row, head, parts, query)
        maxima = load(maximum_ref, place, is_part)
        maxima = jnp.where(is_part, maxima, NOTHING_SEEN)
        new_maximum = jnp.maximum(maximum, jnp.max(maxima))
        keep = jnp.exp(maximum - new_maximum)
        weights = jnp.exp(maxima - new_maximum)
        totals = load(total_ref, place, is_part)
        outputs = load(
            output_ref,
            (row, head, parts[:, None], query, features[None, :]),
            is_part[:, None] & is_feature[None, :],
        )
        return (
            new_maximum,
            total * keep + jnp.sum(totals * weights),
            output * keep + jnp.sum(outputs * weights[:, None], axis=0),
        )

    running = (
        jnp.float32(NOTHING_SEEN),
        jnp.float32(0),
        jnp.zeros(features.shape, jnp.float32),
    )
    tiles = jnp.int32(pl.cdiv(count, tile))
    _, total, output = jax.lax.fori_loop(jnp.int32(0), tiles, add_parts, running)
    place = (row, head, query, features)
    merged = output / jnp.where(total > 0, total, 1)
    store(merged_ref, place, merged.astype(merged_ref.dtype), is_feature)
