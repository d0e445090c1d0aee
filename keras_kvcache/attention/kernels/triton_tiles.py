"""Tiles of arrays within kernels that Triton compiles."""

import jax
import jax.numpy as jnp

# A matrix unit's least rows and columns.
LEAST = 16


def load(ref, place, is_there):
    """The numbers at a place of an array; 0 where `is_there` is false."""
    from jax.experimental.pallas import triton

    return triton.load(ref.at[place], mask=is_there, other=jnp.zeros((), ref.dtype))


def store(ref, place, value, is_there):
    """Writes numbers to a place of an array where `is_there` is true."""
    from jax.experimental.pallas import triton

    triton.store(ref.at[place], value, mask=is_there)


def dot(x, y):
    """A product summed in float32, of float32 factors in full precision."""
    return jax.lax.dot(x, y, precision="highest", preferred_element_type=jnp.float32)


def dot_of_weighed(weights, values):
    """`dot`, to which infinite values and NaN add nothing where their weight is 0.

    A query with another weight for one gets NaN.
    """
    is_finite = jnp.abs(values) < jnp.inf
    is_infinite = jnp.max(1 - is_finite.astype(jnp.int32), axis=1)
    is_weighed = (weights != 0).astype(jnp.int32)
    is_spoilt = jnp.max(is_weighed * is_infinite[None, :], axis=1) > 0
    finite = dot(weights, jnp.where(is_finite, values, 0).astype(values.dtype))
    return jnp.where(is_spoilt[:, None], jnp.nan, finite)


def divide(number, by):
    """Quotient and rest of an int32 from 0 on; int32 with `jax_enable_x64`, too."""
    by = jnp.int32(by)
    return jax.lax.div(number, by), jax.lax.rem(number, by)


def padded_range(size):
    """At least so many numbers from 0 on, as many as a tile has on an axis."""
    return jnp.arange(padded_size(size), dtype=jnp.int32)


def padded_size(size):
    """The least power of two that isn't below the size and that tiles may have."""
    return max(LEAST, 1 << (size - 1).bit_length())
