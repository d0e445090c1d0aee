"""What the attention layer refuses, apart from what its cache and index refuse."""

import numbers

import keras

from keras_kvcache.caches import Cache, DenseCache


def check_constructor(num_heads, num_key_value_heads, query_scale, logit_soft_cap):
    """Refuses constructor arguments that Keras' own layer doesn't know.

    Raises:
        ValueError: `num_heads` isn't a multiple of `num_key_value_heads`, or a
            factor isn't a positive number.
    """
    heads = num_key_value_heads
    if heads is not None and (
        not isinstance(heads, int) or heads <= 0 or num_heads % heads
    ):
        raise ValueError(
            "`num_key_value_heads` must be a positive integer that divides "
            f"`num_heads`. Received: num_key_value_heads={heads}, "
            f"num_heads={num_heads}"
        )
    for name, factor in (
        ("query_scale", query_scale),
        ("logit_soft_cap", logit_soft_cap),
    ):
        if factor is not None and not (isinstance(factor, numbers.Real) and factor > 0):
            raise ValueError(
                f"`{name}` must be a positive number or `None`. Received: {factor!r}"
            )


def as_cache(cache):
    """The cache object behind what the caller gave: a tensor or a cache.

    Raises:
        TypeError: It is neither.
    """
    if isinstance(cache, Cache):
        return cache
    if keras.ops.is_tensor(cache) or keras.backend.is_keras_tensor(cache):
        return DenseCache(cache)
    raise TypeError(
        "`cache` must be a tensor of shape (B, 2, S, K, H) or a cache object of "
        f"`keras_kvcache.caches`. Received: {type(cache).__name__}"
    )


def check_entry_mask(name, mask, batch_size, length):
    """Refuses a Keras mask that doesn't have one value an entry; `None` passes.

    Raises:
        ValueError: The mask isn't of shape `(batch_size, length)`.
    """
    if mask is None:
        return
    shape = tuple(mask.shape)
    fits = len(shape) == 2 and all(
        None in (have, need) or have == need
        for have, need in zip(shape, (batch_size, length), strict=True)
    )
    if not fits:
        raise ValueError(
            f"`{name}` must have one value an entry, shape {(batch_size, length)}. "
            f"Received: {name}.shape={shape}"
        )
