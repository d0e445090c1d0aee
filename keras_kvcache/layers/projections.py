"""Projections: what multiplies a model's rows with its weights."""

import keras
from keras import ops

from keras_kvcache.ops import has_triton, is_tpu


def project(layer, inputs, feature_axes=1):
    """`layer(inputs)`; on a GPU or TPU one row is projected as two.

    Of a product of one row XLA's GPU backend makes multiplications and a sum, unless
    there are ten million weights, and writes to memory what is to be summed or, before
    a loop, transposed weights; on a TPU it doesn't use the matrix units. Two rows stay
    a matrix product, which reads the weights once and, where there are more, costs
    the same.

    Args:
        layer: Layer or function that projects row by row.
        inputs: Tensor of rows, such as `(B, T, D)`.
        feature_axes: How many axes a row has.

    Returns:
        What `layer` returns for them.
    """
    rows = inputs.shape[:-feature_axes]
    is_one = len(rows) > 0 and all(size == 1 for size in rows)
    if not is_one or not (has_triton() or is_tpu()):
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
        A layer, `(B, …, D)` to `(B, …, heads, head_dim)`.
    """
    free = "abcdefgh"[: len(input_shape) - 1]
    return keras.layers.EinsumDense(
        f"{free}x,xnh->{free}nh",
        output_shape=[None] * (len(free) - 1) + [heads, head_dim],
        bias_axes="nh" if attention._use_bias else None,
        activation=activation,
        name=name,
        **attention._get_common_kwargs_for_sublayer(),
    )


def make_output_projection(attention, query_shape):
    """From heads back to the model's width, or to the layer's `output_shape`.

    Args:
        attention: The layer that it's for.
        query_shape: `(B, …, D)`.

    Returns:
        A layer, `(B, …, N, Hv)` to `(B, …, D)`.
    """
    free = "abcdefgh"[: len(query_shape) - 1]
    shape = list(attention._output_shape or query_shape[-1:])
    out = "opqrstuv"[: len(shape)]
    return keras.layers.EinsumDense(
        # Letters in Keras' order, by which JAX orders the sum: bit for bit the same.
        f"{free}ij,ij{out}->{free}{out}",
        output_shape=[None] * (len(free) - 1) + shape,
        bias_axes=out if attention.use_output_bias else None,
        name="attention_output",
        **attention._get_common_kwargs_for_sublayer(),
    )
