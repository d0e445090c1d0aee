"""Attention over a view: few queries, many slots."""

from collections.abc import Callable, Sequence
from typing import Any

from keras import ops

from keras_kvcache.attention.kernels.decode_attention import (
    decode_attention,
    suits_kernel,
)
from keras_kvcache.attention.products import mix, scores_of, sum_dtype
from keras_kvcache.attention.scoring import Scoring, check_scoring
from keras_kvcache.attention.segments import View
from keras_kvcache.attention.softmax import attend_segments, masked_softmax
from keras_kvcache.runtime.platform import current_platform


def attend(
    query: Any,
    view: View,
    masks: Sequence[Any],
    scoring: Scoring,
    positions: Any = None,
) -> Any:
    """Attention of `T` queries over the slots of a view.

    Args:
        query: Tensor `(B, T, N, H)`. Query head `n` reads key/value head
            `n // G`, `G = N // K`.
        view: A `View`. What no query may attend isn't read.
        masks: One boolean mask a segment, `(1 | B, 1 | N, 1 | T, n)`, or `None`
            where every slot may be attended.
        scoring: A `Scoring`.
        positions: int32 `(1 | B, T)`, positions of the queries, which a bias needs.

    Returns:
        A tensor `(B, T, N, Hv)`, float32 unless queries are float64; zero for a
        query with nothing to attend.

    Raises:
        ValueError: The bias or the sink doesn't have one entry a head, or there is a
            bias and no `positions`.
    """
    check_scoring(scoring, query.shape[2], positions)
    shape = ops.shape(query)
    if query.shape[1] == 0:
        return ops.zeros((*shape[:3], view.value_dim), sum_dtype(query))
    query = _group_heads(query * scoring.scale, view.heads)
    arguments = (query, view.segments, masks, shape[1], scoring, positions)
    suits = suits_kernel(query, view.segments, masks, scoring)
    output = (decode_attention if suits else attend_segments)(*arguments)
    return _ungroup_heads(output, shape)


def attend_with_scores(
    query: Any,
    view: View,
    masks: Sequence[Any],
    scoring: Scoring,
    positions: Any = None,
    dropout: Callable[[Any], Any] | None = None,
) -> tuple[Any, Any]:
    """As `attend`, but with all weights at once, to return them or to apply dropout.

    Args:
        query: Tensor `(B, T, N, H)`.
        view: A `View`; all of its slots are read.
        masks, scoring, positions: As in `attend`.
        dropout: Function of the weights, or `None`.

    Returns:
        The output `(B, T, N, Hv)` and the weights `(B, N, T, S)` before dropout,
        of the dtype of `attend`. Where there is a sink the weights of a query sum to
        less than one.
    """
    check_scoring(scoring, query.shape[2], positions)
    shape = ops.shape(query)
    batch, length, query_heads, _ = shape
    query = _group_heads(query * scoring.scale, view.heads)
    sizes = [ops.shape(segment.positions)[1] for segment in view.segments]
    scores = [
        scores_of(segment, query, 0, size)
        for segment, size in zip(view.segments, sizes, strict=True)
    ]
    scores = ops.concatenate(scores, axis=-1)
    scores = ops.reshape(scores, (batch, query_heads, length, -1))
    scores = scoring.cap(scores)
    if scoring.bias is not None:
        biases = (
            scoring.bias_of(positions, segment.positions, scores.dtype)
            for segment in view.segments
        )
        scores = scores + _join(list(biases), view, (batch, query_heads, length))
    weights = masked_softmax(
        scores,
        _join(masks, view, (batch, query_heads, length)),
        sink=None if scoring.sink is None else scoring.sink[:, None, None],
    )
    dropped = weights if dropout is None else dropout(weights)
    dropped = ops.reshape(dropped, (*ops.shape(query)[:3], -1))
    hides = dropout is not None or any(mask is not None for mask in masks)
    output, first = 0.0, 0
    for segment, size in zip(view.segments, sizes, strict=True):
        held = dropped[..., first : first + size]
        output = output + mix(segment, held, 0, size, hides)
        first += size
    return _ungroup_heads(output, shape), weights


def attend_fused(
    query: Any,
    key: Any,
    value: Any,
    mask: Any,
    scale: float,
    causal: bool,
    flash_attention: bool | None,
) -> Any:
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
        A tensor `(B, T, N, Hv)`, zero for a query with nothing to attend; float32 for
        float16 where the kernel has no such products.
    """
    if query.dtype == "float16" and not current_platform().fuses_float16:
        query, key, value = (ops.cast(x, "float32") for x in (query, key, value))
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


def _group_heads(query, heads):
    """`(B, T, N, H)` to `(B, K, R, H)`: the `R = G·T` queries of each head group."""
    batch, length, query_heads, head_dim = ops.shape(query)
    query = ops.transpose(query, (0, 2, 1, 3))
    queries = query_heads // heads * length
    return ops.reshape(query, (batch, heads, queries, head_dim))


def _ungroup_heads(output, shape):
    """`(B, K, R, Hv)` to `(B, T, N, Hv)`; `B`, `T` and `N` are those of `shape`."""
    batch, length, query_heads, _ = shape
    output = ops.reshape(output, (batch, query_heads, length, output.shape[-1]))
    return ops.transpose(output, (0, 2, 1, 3))


def _join(masks, view, shape):
    """Joins the masks or biases of segments to one `(*shape, S)`; `None` if all are."""
    if all(mask is None for mask in masks):
        return None
    joined = []
    for mask, segment in zip(masks, view.segments, strict=True):
        slots = ops.shape(segment.positions)[1]
        mask = True if mask is None else mask
        joined.append(ops.broadcast_to(mask, (*shape, slots)))
    return ops.concatenate(joined, axis=-1)
