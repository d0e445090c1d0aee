"""Shapes and dtypes of the attention layer's results."""

import keras

from keras_kvcache.caches import Cache


def output_spec(layer, query, value, cache, return_attention_scores):
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
