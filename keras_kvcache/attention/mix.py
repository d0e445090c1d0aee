"""Weighted sums of values, to which values of weight 0 add nothing.

A hidden slot may hold NaN or infinity: memory that nothing was written to, or the
entries of a failed request. 0 · NaN is NaN, so a plain product isn't enough. Checking
all values would cost another pass over the cache, so the plain product is tried first,
and values are checked only if a sum isn't finite.
"""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

# Slots that are checked at a time: few, so that this takes little memory.
VALUE_BLOCK = 16
# For keys whole groups, as some codecs encode 32 tokens of them together.
KEY_BLOCK = 32


def is_cut(count: int, block: int) -> bool:
    """Whether to take slots block by block: on JAX, if their number is known."""
    return keras.backend.backend() == "jax" and isinstance(count, int) and count > block


def in_blocks(make: Callable[[Any, int], Any], like: Any) -> Any:
    """Computes `make(0, count)` block by block, which takes little memory.

    Args:
        make: Function of the first slot and the number of slots, which are on the last
            axis of its result.
        like: Tensor of the shape and dtype of the whole result.
    """
    count = like.shape[-1]
    if not is_cut(count, KEY_BLOCK):
        return make(0, count)

    def put(number, made):
        start = ops.minimum(ops.cast(number, "int32") * KEY_BLOCK, count - KEY_BLOCK)
        place = (*[ops.zeros_like(start)] * (len(like.shape) - 1), start)
        return ops.slice_update(made, place, make(start, KEY_BLOCK))

    return ops.fori_loop(0, -(-count // KEY_BLOCK), put, ops.zeros_like(like))


def contract(equation: str, x: Any, y: Any, dtype: str) -> Any:
    """`einsum` that sums in `dtype`; on JAX, operands aren't widened for it."""
    if keras.backend.backend() == "jax":
        import jax.numpy as jnp

        return jnp.einsum(equation, x, y, preferred_element_type=dtype)
    return ops.einsum(equation, ops.cast(x, dtype), ops.cast(y, dtype))


def mix_all(equation: str, weights: Any, values: Any) -> Any:
    """The product, with weights cast to the values' dtype and sums in their own."""
    return contract(equation, ops.cast(weights, values.dtype), values, weights.dtype)


def mix_seen(equation: str, weights: Any, values: Any) -> Any:
    """The product; values that have weight 0 for all queries of a head count as 0."""
    is_seen = ops.any(weights != 0, axis=-2)[..., None]
    return mix_all(equation, weights, ops.where(is_seen, values, 0))


def mix_weighed(equation: str, weights: Any, values: Any) -> Any:
    """The product; to each query, values to which it gives weight 0 add nothing."""
    zeros, is_finite = ops.zeros_like(values), ops.isfinite(values)
    finite = mix_all(equation, weights, ops.where(is_finite, values, zeros))
    is_weighed = ops.cast(ops.cast(weights, values.dtype) != 0, weights.dtype)
    others = ops.where(is_finite, zeros, ops.ones_like(values))
    counts = mix_all(equation, is_weighed, others)
    return ops.where(counts > 0, mix_all(equation, weights, values), finite)
