"""Softmax over what may be attended: of all scores at once, or segment by segment.

Segments are merged by their running maximum and sum, as in online softmax (Milakov
and Gimelshein, 2018, https://arxiv.org/abs/1805.02867), the way flash attention
merges its tiles (Dao et al., 2022, https://arxiv.org/abs/2205.14135). Segments and
blocks of slots that no query may attend are skipped.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_kvcache.attention.products import (
    few_block,
    is_few,
    mix,
    scores_of,
    sum_dtype,
)
from keras_kvcache.attention.scoring import Scoring
from keras_kvcache.attention.segments import Segment, slots_of
from keras_kvcache.runtime.concrete import either, is_recorded

# The score of a hidden slot: finite, so that the difference of two of them is zero and
# not NaN, and far below any other score.
LOWEST = -1e30


def masked_softmax(scores: Any, mask: Any = None, sink: Any = None) -> Any:
    """Softmax in which masked scores have weight 0, even if all are masked.

    Args:
        scores: Float tensor.
        mask: Boolean tensor that broadcasts to `scores`, `False` where a score
            doesn't count. `None` counts all.
        sink: One more score, which takes its share and isn't returned: tensor that
            broadcasts to `scores`, with 1 on the last axis. `None` for none.

    Returns:
        A tensor like `scores` whose last axis sums to one, or to zero where all is
        masked.
    """
    if mask is not None:
        scores = ops.where(mask, scores, ops.cast(LOWEST, scores.dtype))
    maximum = ops.max(scores, axis=-1, keepdims=True)
    if sink is not None:
        sink = ops.cast(sink, scores.dtype)
        maximum = ops.maximum(maximum, sink)
    weights = ops.exp(scores - maximum)
    if mask is not None:
        weights = ops.where(mask, weights, ops.zeros_like(weights))
    total = ops.sum(weights, axis=-1, keepdims=True)
    if sink is not None:
        total = total + ops.exp(sink - maximum)
    return weights / ops.where(total > 0, total, ops.ones_like(total))


# The maximum of no scores: far above the score of a hidden slot, whose weight is then
# 0, and below any other.
NOTHING_SEEN = LOWEST / 10

# Slots that many queries are multiplied with at a time: no score is computed beyond
# the block that holds the last slot seen, and those of a block stay in the
# processor's cache.
BLOCK = 512


def attend_segments(
    query: Any,
    segments: Sequence[Segment],
    masks: Sequence[Any],
    length: int,
    scoring: Scoring,
    positions: Any,
) -> Any:
    """Attention of queries that are scaled and grouped by key/value head.

    Args:
        query: Tensor `(B, K, R, H)`, `R = G·T`.
        segments: Tuple of `Segment`. One that no query may attend isn't read.
        masks: One boolean mask a segment, `(1 | B, 1 | N, 1 | T, n)`, or `None`
            where every slot may be attended.
        length: `T`.
        scoring: A `Scoring`, whose scale is in the queries already.
        positions: int32 `(1 | B, T)`, positions of the queries; may be `None` for a
            scoring without a bias.

    Returns:
        A tensor `(B, K, R, Hv)`, float32 unless queries are float64; zero for a
        query with nothing to attend.
    """
    running = _begin(query, scoring.sink, segments[0].value_dim, length)
    few = is_few(query)
    for segment, mask in zip(segments, masks, strict=True):
        block = few_block(segment) if few else BLOCK
        attended = _Attended(query, segment, mask, scoring, positions, length)
        running = _add_segment(running, attended, block)
    total = ops.where(running.total > 0, running.total, ops.ones_like(running.total))
    return running.output / total


class _Partial(NamedTuple):
    """Attention over some slots, not yet divided by the sum of weights."""

    maximum: Any  # (B, K, R, 1), the largest score
    total: Any  # (B, K, R, 1), the sum of exp(score - maximum)
    output: Any  # (B, K, R, Hv), the sum of exp(score - maximum) · value


class _Attended(NamedTuple):
    """Queries and the segment that they attend."""

    query: Any  # (B, K, R, H), scaled
    segment: Any
    mask: Any  # as in `attend`
    scoring: Scoring
    positions: Any  # of the queries
    length: int  # T

    def partial(self, first, count):
        """Attention over `count` slots of the segment from `first` on."""
        products = scores_of(self.segment, self.query, first, count)
        scores = self.scoring.cap(products)
        if self.scoring.bias is not None:
            slots = slots_of(self.segment.positions, first, count, axis=1)
            bias = self.scoring.bias_of(self.positions, slots, scores.dtype)
            scores = scores + _group_query_heads(bias, self.query, self.length)
        mask = self.mask_of(first, count)
        if mask is not None:
            mask = _group_query_heads(mask, self.query, self.length)
            scores = ops.where(mask, scores, LOWEST)
        maximum = ops.max(scores, axis=-1, keepdims=True)
        maximum = ops.maximum(maximum, NOTHING_SEEN)
        weights = ops.exp(scores - maximum)
        total = ops.sum(weights, axis=-1, keepdims=True)
        output = mix(self.segment, weights, first, count, mask is not None)
        return _Partial(maximum, total, output)

    def mask_of(self, first, count):
        """The mask of these slots."""
        if self.mask is None or self.mask.shape[3] == 1:
            return self.mask
        return slots_of(self.mask, first, count, axis=3)

    def add_block(self, running, first, count):
        """Merges a block in unless it's hidden; skips a mask that hides nothing."""
        if is_recorded():
            return _merge_partials(running, self.partial(first, count))
        mask = self.mask_of(first, count)

        def add(running):
            unmasked = self._replace(mask=None)
            part = _either(
                True if mask is None else ops.all(mask),
                lambda: unmasked.partial(first, count),
                lambda: self.partial(first, count),
            )
            return _merge_partials(running, part)

        return _either(_any(mask), lambda: add(running), lambda: running)


def _add_segment(running, attended, block):
    """Merges a segment in unless it's hidden."""
    if is_recorded():
        return _add_slots(running, attended, block)
    return _either(
        _any(attended.mask),
        lambda: _add_slots(running, attended, block),
        lambda: running,
    )


def _add_slots(running, attended, block):
    """Merges the slots of a segment in, a block at a time if `block` is given."""
    slots = attended.segment.positions.shape[1]
    if not isinstance(slots, int) or block is None or slots <= block:
        slots = ops.shape(attended.segment.positions)[1]
        return _merge_partials(running, attended.partial(0, slots))

    # A rest would be one more piece of program to compile, for every layer.
    if slots % block and slots % (block // 2) == 0:
        block //= 2

    def add(number, running):
        return attended.add_block(running, number * block, block)

    blocks, rest = divmod(slots, block)
    if keras.backend.backend() == "jax":
        import jax

        running = jax.lax.fori_loop(0, blocks, add, running)
    else:
        for number in range(blocks):
            running = add(number, running)
    return attended.add_block(running, blocks * block, rest) if rest else running


def _begin(query, sink, value_dim, length):
    """The initial partial: nothing, or a sink, which has a weight and no value."""
    shape, dtype = ops.shape(query)[:3], sum_dtype(query)
    output = ops.zeros((*shape, value_dim), dtype)
    if sink is None:
        maximum = ops.full((*shape, 1), NOTHING_SEEN, dtype)
        return _Partial(maximum, ops.zeros((*shape, 1), dtype), output)
    sink = ops.reshape(ops.cast(sink, dtype), (1, -1, 1, 1))
    sink = _group_query_heads(sink, query, length)
    maximum = ops.broadcast_to(sink, (*shape, 1))
    return _Partial(maximum, ops.ones((*shape, 1), dtype), output)


def _group_query_heads(x, query, length):
    """Reshapes `(1 | B, 1 | N, 1 | T, n)` so that it broadcasts to `(B, K, R, n)`."""
    _, heads, queries, _ = ops.shape(query)
    rows, query_heads, _, slots = ops.shape(x)
    group = queries // length
    if query_heads == 1:
        heads = 1
    x = ops.broadcast_to(x, (rows, heads * group, length, slots))
    return ops.reshape(x, (rows, heads, group * length, slots))


def _merge_partials(a, b):
    maximum = ops.maximum(a.maximum, b.maximum)
    keep_a, keep_b = ops.exp(a.maximum - maximum), ops.exp(b.maximum - maximum)
    return _Partial(
        maximum,
        a.total * keep_a + b.total * keep_b,
        a.output * keep_a + b.output * keep_b,
    )


def _any(mask):
    return True if mask is None else ops.any(mask)


def _either(predicate, then, otherwise):
    """`then()` where the predicate holds, else `otherwise()`; `_Partial`s both."""
    return _Partial(
        *either(predicate, lambda: tuple(then()), lambda: tuple(otherwise()))
    )
