"""Results of a call of the attention layer, and their shapes and dtypes."""

from typing import Any

import keras
from keras import ops

from keras_kvcache.caches import Cache


def results(output: Any, scores: Any, cache: Any, updated: Any) -> Any:
    """The results of a call: those that were asked for.

    Args:
        output: `(B, T, D)`.
        scores: `(B, N, T, S)`, or `None` where they weren't asked for.
        cache: The call's argument, in whose form the cache comes back, or `None`.
        updated: The cache object.
    """
    returned = (output,)
    if scores is not None:
        returned += (ops.cast(scores, output.dtype),)
    if cache is not None:
        returned += (updated if isinstance(cache, Cache) else updated.to_dense(),)
    return returned if len(returned) > 1 else output


def output_spec(
    layer: keras.layers.Layer,
    query: Any,
    value: Any,
    cache: Any,
    return_attention_scores: bool,
) -> Any:
    """The symbolic result of a call.

    Args:
        layer: The `CachedMultiHeadAttention`.
        query, value, cache, return_attention_scores: Arguments of the call, checked.

    Returns:
        A `keras.KerasTensor` or a tuple of them, in the place of the call's tensors.

    Raises:
        TypeError: The cache is an object that Keras can't carry.
    """
    if isinstance(cache, Cache):
        raise TypeError(
            "`cache` must be a dense tensor in a functional model, as Keras "
            f"can't carry other objects there. Received: {type(cache).__name__}"
        )
    output_shape = (*query.shape[:2], *(layer._output_shape or query.shape[2:]))
    returned = (keras.KerasTensor(output_shape, layer.compute_dtype),)
    if return_attention_scores:
        slots = value.shape[1] if cache is None else cache.shape[2]
        shape = (query.shape[0], layer._num_heads, query.shape[1], slots)
        returned += (keras.KerasTensor(shape, layer.compute_dtype),)
    if cache is not None:
        returned += (keras.KerasTensor(cache.shape, cache.dtype),)
    return returned if len(returned) > 1 else returned[0]
