"""Checks of the attention layer's arguments, but for those of cache and index."""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_kvcache.attention import normalize_index
from keras_kvcache.attention.masks import check_mask_shape
from keras_kvcache.caches import as_cache
from keras_kvcache.layers.scoring import asked_of_scores, check_scoring_arguments
from keras_kvcache.runtime.concrete import is_integer

# Constructor arguments that are layers.
LAYER_ARGUMENTS = ("rotary_embedding", "query_norm", "key_norm")


def check_constructor(layer: keras.layers.Layer) -> None:
    """Refuses constructor arguments that Keras' own layer doesn't know.

    Raises:
        TypeError: What should be a layer isn't one.
        ValueError: `num_heads` isn't a multiple of `num_key_value_heads`, a factor
            isn't a positive number, a bias is none, or flash attention is asked for
            what it can't.
    """
    heads = layer.num_key_value_heads
    if not (is_integer(heads) and heads > 0) or layer.num_heads % heads:
        raise ValueError(
            "`num_key_value_heads` must be a positive integer that divides "
            f"`num_heads`. Received: num_key_value_heads={heads}, "
            f"num_heads={layer.num_heads}"
        )
    for name in LAYER_ARGUMENTS:
        sublayer = getattr(layer, name)
        if sublayer is not None and not isinstance(sublayer, keras.layers.Layer):
            raise TypeError(
                f"`{name}` must be a Keras layer or `None`. Received: {sublayer!r}"
            )
    check_scoring_arguments(layer)


def check_multi_axis_call(
    layer: keras.layers.Layer, cache: Any, cache_update_index: Any
) -> None:
    """Refuses cache arguments where attention runs over other axes than axis 1.

    Raises:
        ValueError: Something is asked for that Keras' own layer doesn't have.
    """
    ours = {
        "cache": cache is not None,
        "cache_update_index": cache_update_index is not None,
        "num_key_value_heads": layer.num_key_value_heads != layer.num_heads,
        "rotary_embedding": layer.rotary_embedding is not None,
        "query_norm": layer.query_norm is not None,
        "key_norm": layer.key_norm is not None,
    }
    asked = [name for name, is_asked in ours.items() if is_asked]
    asked += asked_of_scores(layer)
    if asked:
        raise ValueError(
            f"`{asked[0]}` needs inputs of shape (B, T, D) attended over axis 1. "
            f"Received: attention_axes={layer.attention_axes}"
        )


def read_call(
    layer: keras.layers.Layer,
    query: Any,
    value: Any,
    key: Any,
    cache: Any,
    cache_update_index: Any,
    return_attention_scores: bool,
    attention_mask: Any = None,
    query_mask: Any = None,
    value_mask: Any = None,
    key_mask: Any = None,
) -> Any:
    """Refuses inputs that don't fit together.

    Args:
        layer: The `CachedMultiHeadAttention`.
        query, value, key, cache, cache_update_index, return_attention_scores,
            attention_mask, query_mask, value_mask, key_mask: Of its call.

    Returns:
        The cache object, or `None`, and the index, 0 where there is none.

    Raises:
        ValueError: A shape or a value doesn't fit.
        TypeError: The index isn't an integer or the cache isn't a cache of floats.
    """
    if layer._flash_attention and return_attention_scores:
        raise ValueError(
            "`return_attention_scores` can't be combined with flash attention, which "
            "never holds the scores. Received: return_attention_scores=True"
        )
    if len(query.shape) != 3:
        raise ValueError(
            "`query` must be of shape (B, T, D). Received: "
            f"query.shape={tuple(query.shape)}"
        )
    batch, length = query.shape[:2]
    reads_only = cache is not None and cache_update_index is None
    if not reads_only:
        _check_entries(batch, value=value, key=value if key is None else key)
    cache_object, index, entries = None, 0, None if reads_only else value.shape[1]
    slots = entries
    if cache is not None:
        cache_object = as_cache(cache)
        cache_object.check(
            batch, layer.num_key_value_heads, layer.key_dim, layer.value_dim
        )
        slots = cache_object.max_length
    if cache_update_index is not None:
        if cache is None:
            raise ValueError(
                "`cache_update_index` needs a `cache`. Received: cache=None, "
                f"cache_update_index={cache_update_index}"
            )
        index = normalize_index(cache_update_index, batch, entries, slots)

    if attention_mask is not None:
        check_mask_shape(attention_mask, (batch, layer.num_heads, length, slots))
    _check_entry_mask("query_mask", query_mask, batch, length)
    if not reads_only:
        _check_entry_mask("value_mask", value_mask, batch, entries)
        _check_entry_mask("key_mask", key_mask, batch, entries)
    return cache_object, index


def _check_entries(batch_size, value, key):
    """Refuses a value and a key that can't be projected to entries."""
    if value is None:
        raise ValueError(
            "`value` may be `None` only where a `cache` is read without "
            "`cache_update_index`. Received: value=None"
        )
    length = value.shape[1]
    for name, tensor in (("value", value), ("key", key)):
        if len(tensor.shape) != 3 or not _fits(tensor.shape[:2], (batch_size, length)):
            raise ValueError(
                "`value` and `key` must be of shape (B, T', D), B = "
                f"{batch_size} being the query's. Received: {name}.shape="
                f"{tuple(tensor.shape)}, value.shape={tuple(value.shape)}"
            )


def _check_entry_mask(name, mask, batch_size, length):
    """Refuses a Keras mask that doesn't have one value an entry; `None` passes."""
    if mask is not None and not _fits(mask.shape, (batch_size, length)):
        raise ValueError(
            f"`{name}` must have one value an entry, shape {(batch_size, length)}. "
            f"Received: {name}.shape={tuple(mask.shape)}"
        )


def _fits(shape, expected):
    """Whether a shape is the expected one as far as both are known."""
    return len(shape) == len(expected) and all(
        None in (have, need) or have == need
        for have, need in zip(shape, expected, strict=True)
    )


def without_masks(inputs: Sequence[Any], masks: Sequence[Any]) -> tuple[Any, ...]:
    """Inputs that carry no masks, of which projections would warn.

    Args:
        inputs: Tensors or `None`. What has a mask is copied; the caller's keeps it.
        masks: The mask of each input, or `None`.
    """
    return tuple(
        tensor if mask is None or tensor is None else ops.copy(tensor)
        for tensor, mask in zip(inputs, masks, strict=True)
    )
