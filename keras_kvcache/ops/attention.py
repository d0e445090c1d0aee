"""Attention over a view: few queries, many slots.

Segments are merged by their running maximum and sum, as in online softmax (Milakov
and Gimelshein, 2018, https://arxiv.org/abs/1805.02867), the way flash attention
merges its tiles (Dao et al., 2022, https://arxiv.org/abs/2205.14135).
"""

from typing import Any, NamedTuple

import keras
from keras import ops

from keras_kvcache.ops.known import known_value
from keras_kvcache.ops.products import is_few, sum_dtype
from keras_kvcache.ops.softmax import LOWEST, masked_softmax

# The maximum of no scores: so far above the score of a hidden slot that this weighs
# nothing, and below any other.
NOTHING_SEEN = LOWEST / 10

# Slots that many queries are multiplied with at a time: no score is computed beyond
# the block that holds the last slot seen, and those of a block stay in the
# processor's cache.
BLOCK = 512


class _Partial(NamedTuple):
    """Attention over some of the slots, not yet divided by the sum of weights."""

    maximum: Any  # (B, K, R, 1), the largest score
    total: Any  # (B, K, R, 1), the sum of exp(score - maximum)
    output: Any  # (B, K, R, Hv), the sum of exp(score - maximum) · value


def attend(query, view, masks, scale, soft_cap=None):
    """Attention of `T` queries over the slots of a view.

    Args:
        query: Tensor `(B, T, N, H)`. Query head `n` reads key/value head
            `n // G`, `G = N // K`.
        view: A `View`. A segment that no query may attend isn't read.
        masks: One boolean mask a segment, `(1 | B, 1 | N, 1 | T, n)`, or `None`
            where every slot may be attended.
        scale: Factor of the scores, usually `H ** -0.5`.
        soft_cap: If given, scores become `soft_cap · tanh(scores / soft_cap)`
            (Gemma 2, https://arxiv.org/abs/2408.00118).

    Returns:
        A tensor `(B, T, N, Hv)`, float32 unless queries are float64; zero for a
        query with nothing to attend.
    """
    shape, dtype = ops.shape(query), sum_dtype(query)
    query = _group_heads(query * scale, view.heads)
    rows = ops.shape(query)[:3]
    running = _Partial(
        ops.full((*rows, 1), NOTHING_SEEN, dtype),
        ops.zeros((*rows, 1), dtype),
        ops.zeros((*rows, view.value_dim), dtype),
    )
    few = is_few(query)
    for segment, mask in zip(view.segments, masks, strict=True):
        block = segment.block if few else BLOCK
        attended = _Attended(query, segment, mask, soft_cap, shape)
        running = _add_segment(running, attended, block)
    total = ops.where(running.total > 0, running.total, ops.ones_like(running.total))
    return _ungroup_heads(running.output / total, shape)


def attend_with_scores(query, view, masks, scale, soft_cap=None, dropout=None):
    """Like `attend`, with all weights at hand: for showing or dropping them.

    Args:
        query: Tensor `(B, T, N, H)`.
        view: A `View`; all of its slots are read.
        masks: As in `attend`.
        scale: As in `attend`.
        soft_cap: As in `attend`.
        dropout: Function of the weights, or `None`.

    Returns:
        The output `(B, T, N, Hv)` and the weights `(B, N, T, S)` before dropout,
        of the dtype of `attend`.
    """
    shape = ops.shape(query)
    batch, length, query_heads, _ = shape
    query = _group_heads(query * scale, view.heads)
    sizes = [ops.shape(segment.positions)[1] for segment in view.segments]
    scores = [
        segment.scores(query, 0, size)
        for segment, size in zip(view.segments, sizes, strict=True)
    ]
    scores = ops.concatenate(scores, axis=-1)
    scores = ops.reshape(scores, (batch, query_heads, length, -1))
    if soft_cap is not None:
        scores = soft_cap * ops.tanh(scores / soft_cap)
    weights = masked_softmax(scores, _join(masks, view, (batch, query_heads, length)))
    dropped = weights if dropout is None else dropout(weights)
    dropped = ops.reshape(dropped, (*ops.shape(query)[:3], -1))
    output, first = 0.0, 0
    for segment, size in zip(view.segments, sizes, strict=True):
        part = dropped[..., first : first + size]
        output = output + segment.mix(part, 0, size)
        first += size
    return _ungroup_heads(output, shape), weights


def attend_fused(query, key, value, mask, scale, causal, flash_attention):
    """Attention of a whole sequence by the backend's fused kernel.

    Args:
        query: Tensor `(B, T, N, H)`.
        key: Tensor `(B, S, K, H)`.
        value: Tensor `(B, S, K, Hv)`.
        mask: Boolean `(1 | B, 1 | N, 1 | T, S)`, or `None`.
        scale: Factor of the scores.
        causal: Whether query `t` sees keys `0 … t` only.
        flash_attention: As in `keras.ops.dot_product_attention`.

    Returns:
        A tensor `(B, T, N, Hv)`, zero for a query with nothing to attend.
    """
    group = query.shape[2] // key.shape[2]
    output = ops.dot_product_attention(
        query,
        ops.repeat(key, group, axis=2) if group > 1 else key,
        ops.repeat(value, group, axis=2) if group > 1 else value,
        mask=mask,
        scale=scale,
        is_causal=causal,
        flash_attention=flash_attention,
    )
    if mask is None:
        return output
    # Kernels give the mean of all values where a row of the mask is empty.
    attends = ops.transpose(ops.any(mask, axis=-1, keepdims=True), (0, 2, 1, 3))
    return ops.where(attends, output, ops.zeros_like(output))


class _Attended(NamedTuple):
    """Queries, and what they attend of a segment."""

    query: Any  # (B, K, R, H), scaled
    segment: Any
    mask: Any  # as in `attend`
    soft_cap: float | None
    shape: tuple  # (B, T, N, H) of the queries

    def partial(self, first, count):
        """Attention over `count` slots of the segment from `first` on."""
        scores = self.segment.scores(self.query, first, count)
        if self.soft_cap is not None:
            scores = self.soft_cap * ops.tanh(scores / self.soft_cap)
        mask = self.mask_of(first, count)
        if mask is not None:
            mask = _group_mask_heads(mask, self.query.shape[1], self.shape)
            scores = ops.where(mask, scores, LOWEST)
        maximum = ops.max(scores, axis=-1, keepdims=True)
        maximum = ops.maximum(maximum, NOTHING_SEEN)
        weights = ops.exp(scores - maximum)
        total = ops.sum(weights, axis=-1, keepdims=True)
        return _Partial(maximum, total, self.segment.mix(weights, first, count))

    def mask_of(self, first, count):
        """The mask of these slots."""
        if self.mask is None or self.mask.shape[3] in (None, 1, count):
            return self.mask
        shape = (*ops.shape(self.mask)[:3], count)
        return ops.slice(self.mask, (0, 0, 0, first), shape)

    def add_block(self, running, first, count):
        """Merges a block in, unless it's hidden; a mask that hides nothing costs."""
        mask = self.mask_of(first, count)

        def add(running):
            unmasked = self._replace(mask=None)
            part = _either(
                True if mask is None else ops.all(mask),
                lambda: unmasked.partial(first, count),
                lambda: self.partial(first, count),
            )
            return _merge(running, part)

        return _either(_any(mask), lambda: add(running), lambda: running)


def _add_segment(running, attended, block):
    """Merges a segment in, unless it's hidden."""
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
        return _merge(running, attended.partial(0, slots))

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


def _group_heads(query, heads):
    """`(B, T, N, H)` to `(B, K, R, H)`, `R = G·T`, the heads of a group together."""
    batch, length, query_heads, head_dim = ops.shape(query)
    query = ops.transpose(query, (0, 2, 1, 3))
    rows = query_heads // heads * length
    return ops.reshape(query, (batch, heads, rows, head_dim))


def _ungroup_heads(output, shape):
    """`(B, K, R, Hv)` to `(B, T, N, Hv)`, with these of `shape`."""
    batch, length, query_heads, _ = shape
    output = ops.reshape(output, (batch, query_heads, length, output.shape[-1]))
    return ops.transpose(output, (0, 2, 1, 3))


def _group_mask_heads(mask, heads, shape):
    """`(1 | B, 1 | N, 1 | T, n)` to what broadcasts to `(B, K, R, n)`."""
    _, length, query_heads, _ = shape
    rows, mask_heads, _, slots = ops.shape(mask)
    group = query_heads // heads
    if mask_heads == 1:
        heads = 1
    mask = ops.broadcast_to(mask, (rows, heads * group, length, slots))
    return ops.reshape(mask, (rows, heads, group * length, slots))


def _merge(a, b):
    maximum = ops.maximum(a.maximum, b.maximum)
    keep_a, keep_b = ops.exp(a.maximum - maximum), ops.exp(b.maximum - maximum)
    return _Partial(
        maximum,
        a.total * keep_a + b.total * keep_b,
        a.output * keep_a + b.output * keep_b,
    )


def _join(masks, view, shape):
    """One mask `(*shape, S)` of one a segment; `None` if nothing is hidden."""
    if all(mask is None for mask in masks):
        return None
    joined = []
    for mask, segment in zip(masks, view.segments, strict=True):
        slots = ops.shape(segment.positions)[1]
        mask = True if mask is None else mask
        joined.append(ops.broadcast_to(mask, (*shape, slots)))
    return ops.concatenate(joined, axis=-1)


def _any(mask):
    return True if mask is None else ops.any(mask)


def _either(predicate, then, otherwise):
    """`then()` where the predicate holds, else `otherwise()`; `_Partial`s both."""
    known = known_value(predicate)
    if known is not None:
        return then() if known else otherwise()
    return _Partial(
        *ops.cond(predicate, lambda: tuple(then()), lambda: tuple(otherwise()))
    )
