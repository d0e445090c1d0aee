"""Attention over a view: few queries, many slots.

Scores and weighted sums are computed with batch and key/value heads merged to
one axis, `(B·K, n, H)`: on a CPU a separate batch axis of size 1 costs a factor
of ten. Segments are merged by their running maximum and sum, as in online
softmax (Milakov and Gimelshein, 2018, https://arxiv.org/abs/1805.02867), the
way flash attention merges its tiles (Dao et al., 2022,
https://arxiv.org/abs/2205.14135).
"""

from typing import Any, NamedTuple

import keras
from keras import ops

from keras_kvcache.ops.known import known_value
from keras_kvcache.ops.softmax import LOWEST, masked_softmax


class _Partial(NamedTuple):
    """Attention over some of the slots, not yet divided by the sum of weights."""

    maximum: Any  # (B·K, G·T, 1), the largest score
    total: Any  # (B·K, G·T, 1), the sum of exp(score - maximum)
    output: Any  # (B·K, G·T, Hv), the sum of exp(score - maximum) · value


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
    batch, length, query_heads = ops.shape(query)[:3]
    query = ops.transpose(query * scale, (0, 2, 1, 3))
    rows = (batch * view.heads, query_heads // view.heads * length)
    dtype = _sum_dtype(query)
    running = _Partial(
        ops.full((*rows, 1), LOWEST, dtype),
        ops.zeros((*rows, 1), dtype),
        ops.zeros((*rows, view.value_dim), dtype),
    )
    for segment, mask in zip(view.segments, masks, strict=True):

        def read(running, segment=segment, mask=mask):
            part = _attend_segment(query, *segment.read(), mask, soft_cap)
            return _merge(running, part)

        running = _read_if(_any(mask), read, running)
    total = ops.where(running.total > 0, running.total, ops.ones_like(running.total))
    output = running.output / total
    output = ops.reshape(output, (batch, query_heads, length, output.shape[-1]))
    return ops.transpose(output, (0, 2, 1, 3))


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
    batch, length, query_heads, _ = ops.shape(query)
    dtype = _sum_dtype(query)
    keys, values = zip(*(segment.read() for segment in view.segments), strict=True)
    keys, values = ops.concatenate(keys, axis=2), ops.concatenate(values, axis=2)
    group = query_heads // keys.shape[1]
    keys, values = ops.repeat(keys, group, axis=1), ops.repeat(values, group, axis=1)
    query = query * scale
    scores = _contract("btnh,bnsh->bnts", query, keys, dtype)
    if soft_cap is not None:
        scores = soft_cap * ops.tanh(scores / soft_cap)
    weights = masked_softmax(scores, _join(masks, view, (batch, query_heads, length)))
    dropped = weights if dropout is None else dropout(weights)
    return _contract("bnts,bnsh->btnh", dropped, values, dtype), weights


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


def _attend_segment(query, keys, values, mask, soft_cap):
    """Query `(B, N, T, H)` over keys and values `(B, K, n, H)`."""
    batch, query_heads, length, _ = ops.shape(query)
    heads, slots = keys.shape[1], ops.shape(keys)[2]
    group = query_heads // heads
    query = ops.reshape(query, (batch * heads, group * length, query.shape[-1]))
    keys = ops.reshape(keys, (batch * heads, slots, keys.shape[-1]))
    values = ops.reshape(values, (batch * heads, slots, values.shape[-1]))
    dtype = _sum_dtype(query)
    scores = _contract("xqh,xnh->xqn", query, keys, dtype)
    if soft_cap is not None:
        scores = soft_cap * ops.tanh(scores / soft_cap)
    if mask is not None:
        mask = _merge_heads(mask, batch, heads, group, length)
        scores = ops.where(mask, scores, LOWEST)
    maximum = ops.max(scores, axis=-1, keepdims=True)
    weights = ops.exp(scores - maximum)
    if mask is not None:
        weights = ops.where(mask, weights, 0.0)
    return _Partial(
        maximum,
        ops.sum(weights, axis=-1, keepdims=True),
        _contract("xqn,xnh->xqh", ops.cast(weights, values.dtype), values, dtype),
    )


def _sum_dtype(query):
    """What scores and sums are computed in, however narrow queries and slots are."""
    dtype = keras.backend.standardize_dtype(query.dtype)
    return "float64" if dtype == "float64" else "float32"


def _contract(equation, x, y, dtype):
    """`einsum` that sums in `dtype`; JAX can without widening the operands first."""
    if keras.backend.backend() == "jax":
        import jax.numpy as jnp

        return jnp.einsum(equation, x, y, preferred_element_type=dtype)
    return ops.einsum(equation, ops.cast(x, dtype), ops.cast(y, dtype))


def _merge_heads(mask, batch, heads, group, length):
    """`(1 | B, 1 | N, 1 | T, n)` to what broadcasts to `(B·K, G·T, n)`."""
    slots = ops.shape(mask)[3]
    if mask.shape[:2] == (1, 1):
        shape = (1, group, length, slots)
        return ops.reshape(ops.broadcast_to(mask, shape), (1, group * length, slots))
    mask = ops.broadcast_to(mask, (batch, heads * group, length, slots))
    return ops.reshape(mask, (batch * heads, group * length, slots))


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


def _read_if(predicate, read, running):
    """`read(running)` where the predicate holds, else `running`, untouched."""
    known = known_value(predicate)
    if known is not None:
        return read(running) if known else running
    return _Partial(
        *ops.cond(predicate, lambda: tuple(read(running)), lambda: tuple(running))
    )
