"""Attention through a cache as pure functions: what lies between the projections."""

from typing import Any

import jax
import keras
from keras import ops

from keras_kvcache.attention import (
    attend,
    attend_fused,
    sequence_view,
    token_positions,
    view_masks,
)


def update_and_mask(
    cache: Any,
    query: Any,
    entries: Any,
    index: Any,
    *,
    masks: Any,
    causal: bool,
    sliding_window: int | None,
) -> Any:
    """Writes what there is to write, and shows what a call may attend to.

    The three modes: without a cache the entries are attended, without entries what the
    cache holds, and with both what it holds once they are written.

    Args:
        cache: A cache, or `None`.
        query: Tensor `(B, T, N, H)`.
        entries: Pair of keys `(B, T', K, H)` and values `(B, T', K, Hv)`, or `None`.
        index: An int, or an integer tensor of shape `()` or `(B,)`: position of the
            first entry and of the first query.
        masks: Dictionary of `attention_mask`, `query_mask` and `entry_masks`, as in
            `keras_kvcache.attention.view_masks`.
        causal, sliding_window: As there.

    Returns:
        The cache as it is now, a `View`, and a mask or `None` for each segment of it.
    """
    if cache is None:
        view = sequence_view(*entries)
    elif entries is None:
        view = cache.view()
    else:
        cache, view = cache.update(*entries, index)
    hidden = view_masks(
        view,
        token_positions(index, ops.shape(query)[1]),
        causal=causal,
        sliding_window=sliding_window,
        index=index,
        **masks,
    )
    return cache, view, hidden


def query_positions(query: Any, index: Any, scoring: Any) -> Any:
    """Positions of the queries, int32 `(1 | B, T)`; `None` where there is no bias."""
    if scoring.bias is None:
        return None
    return token_positions(index, ops.shape(query)[1])


def attend_sequence(
    query: Any,
    keys: Any,
    values: Any,
    scale: float,
    flash_attention: bool | None,
    *,
    masks: Any,
    causal: bool,
    sliding_window: int | None,
) -> Any:
    """Attends a whole sequence by Keras' fused attention.

    Args:
        query: Tensor `(B, T, N, H)`.
        keys: Tensor `(B, T', K, H)`.
        values: Tensor `(B, T', K, H)`.
        scale: Factor of the scores.
        flash_attention: As in `keras.ops.dot_product_attention`.
        masks, causal, sliding_window: As in `update_and_mask`.

    Returns:
        A tensor `(B, T, N, H)`, as of `keras_kvcache.attention.attend_fused`.
    """
    # Kernels are fastest where they make the causal mask themselves.
    is_causal = causal and sliding_window is None and not any_mask(masks)
    mask = None
    if not is_causal:
        _, _, (mask,) = update_and_mask(
            None,
            query,
            (keys, values),
            0,
            masks=masks,
            causal=causal,
            sliding_window=sliding_window,
        )
    return attend_fused(query, keys, values, mask, scale, is_causal, flash_attention)


def any_mask(masks: Any) -> Any:
    """Whether the caller gave a mask, of `masks` as in `update_and_mask`."""
    *of_queries, entry_masks = masks.values()
    return bool(entry_masks) or any(mask is not None for mask in of_queries)


def cached_attention(
    cache: Any, query: Any, entries: Any, index: Any, scoring: Any, **hiding: Any
) -> Any:
    """Writes what there is to write, and attends.

    In a program whose index is an argument, layers that are alike are traced once: this
    is most of what there is to trace in a model.

    Args:
        cache, query, entries, index: As in `update_and_mask`.
        scoring: A `keras_kvcache.attention.Scoring`.
        **hiding: The other arguments of `update_and_mask`.

    Returns:
        A tensor `(B, T, N, Hv)`, as of `attend`, and the cache as it is now.
    """
    # An index that is known stays so, as some writes are cheaper then. And how tensors
    # lie on devices is no part of what JAX tells traces apart by, nor are the weights
    # that a function may hold.
    is_traced_once = (
        isinstance(query, jax.core.Tracer)
        and (entries is None or isinstance(index, jax.core.Tracer))
        and keras.distribution.distribution() is None
        and scoring.function is None
    )
    run = _cached_attention_traced_once if is_traced_once else _cached_attention
    output, updated = run(cache, query, entries, index, scoring, **hiding)
    return output, cache if entries is None else updated


def _cached_attention(cache, query, entries, index, scoring, **hiding):
    cache, view, hidden = update_and_mask(cache, query, entries, index, **hiding)
    positions = query_positions(query, index, scoring)
    output = attend(query, view, hidden, scoring, positions)
    return output, cache


_cached_attention_traced_once = jax.jit(
    _cached_attention, static_argnames=("causal", "sliding_window")
)
