"""Attention through a cache: entries are written, slots hidden, the rest attended."""

import functools

import jax
from keras import ops

from keras_kvcache.ops import attend, sequence_view, token_positions, view_masks


def look(cache, query, entries, index, *, masks, causal, sliding_window):
    """Writes entries and shows what a call may attend to.

    Args:
        cache: A cache, or `None` to attend the entries alone.
        query: Tensor `(B, T, N, H)`.
        entries: Pair of keys `(B, T', K, H)` and values `(B, T', K, Hv)`, or `None` to
            attend what the cache holds.
        index: An int, or an integer tensor of shape `()` or `(B,)`: position of the
            first entry and of the first query.
        masks: Dictionary of `attention_mask`, `query_mask` and `entry_masks`, as in
            `keras_kvcache.ops.view_masks`.
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


def attend_cache(cache, query, entries, index, *, scale, soft_cap, **options):
    """Writes entries and attends.

    Layers that are alike are traced once, where this is part of a program whose index
    is an argument: it's most of what there is to trace in a model.

    Args:
        cache, query, entries, index: As in `look`.
        scale, soft_cap: As in `keras_kvcache.ops.attend`.
        **options: The other arguments of `look`.

    Returns:
        A tensor `(B, T, N, Hv)`, as of `attend`, and the cache as it is now.
    """
    # An index that is known now may stay so: then it's cheaper to write there.
    is_traced = isinstance(query, jax.core.Tracer) and (
        entries is None or isinstance(index, jax.core.Tracer)
    )
    run = _attend_cache_traced_once if is_traced else _attend_cache
    return run(cache, query, entries, index, scale=scale, soft_cap=soft_cap, **options)


def _attend_cache(cache, query, entries, index, *, scale, soft_cap, **options):
    cache, view, hidden = look(cache, query, entries, index, **options)
    return attend(query, view, hidden, scale, soft_cap), cache


_attend_cache_traced_once = functools.partial(
    jax.jit, static_argnames=("scale", "soft_cap", "causal", "sliding_window")
)(_attend_cache)
