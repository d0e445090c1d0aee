"""Projections: what multiplies a model's rows with its weights."""

import keras
from keras import ops

from keras_kvcache.ops import has_triton


def project(layer, inputs):
    """`layer(inputs)`; on a GPU one token is projected as two.

    XLA's GPU backend takes a product of one row with fewer than ten million weights
    apart, into multiplications whose results it writes to memory and a sum that few
    processors read, or transposes the weights before a loop. A product of two rows
    it leaves to the matrix units, which read the weights once and as they are.

    Args:
        layer: Projects token by token.
        inputs: Tensor `(B, T, …)`.

    Returns:
        What `layer` returns for them.
    """
    if tuple(inputs.shape[:2]) != (1, 1) or not has_triton():
        return layer(inputs)
    return layer(ops.broadcast_to(inputs, (2, *inputs.shape[1:])))[:1]


def make_projection(attention, name, input_shape, heads, head_dim, activation=None):
    """From the model's width to heads.

    Args:
        attention: The layer that it's for.
        name: Name of the projection.
        input_shape: `(B, …, D)`.
        heads: `N` or `K`.
        head_dim: Size of a head.
        activation: Applied to what comes out.

    Returns:
        A built layer, `(B, …, D)` to `(B, …, heads, head_dim)`.
    """
    free = "abcdefgh"[: len(input_shape) - 1]
    layer = keras.layers.EinsumDense(
        f"{free}x,xnh->{free}nh",
        output_shape=[None] * (len(free) - 1) + [heads, head_dim],
        bias_axes="nh" if attention._use_bias else None,
        activation=activation,
        name=name,
        **attention._get_common_kwargs_for_sublayer(),
    )
    layer.build(input_shape)
    return layer


def make_output_projection(attention, query_shape):
    """From heads back to the model's width, or to the layer's `output_shape`.

    Args:
        attention: The layer that it's for.
        query_shape: `(B, …, D)`.

    Returns:
        A built layer, `(B, …, N, Hv)` to `(B, …, D)`.
    """
    free = "abcdefgh"[: len(query_shape) - 1]
    shape = list(attention._output_shape or query_shape[-1:])
    out = "opqrstuv"[: len(shape)]
    layer = keras.layers.EinsumDense(
        # Letters in Keras' order, by which JAX orders the sum: bit for bit the same.
        f"{free}ij,ij{out}->{free}{out}",
        output_shape=[None] * (len(free) - 1) + shape,
        bias_axes=out if attention.use_output_bias else None,
        name="attention_output",
        **attention._get_common_kwargs_for_sublayer(),
    )
    layer.build((*query_shape[:-1], attention._num_heads, attention._value_dim))
    return layer
