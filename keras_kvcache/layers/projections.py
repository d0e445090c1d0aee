"""Projections: products of a model's rows with its weights."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from keras_kvcache.runtime.platform import current_platform
from keras_kvcache.runtime.tracing import can_trace


def project(layer: keras.layers.Layer, inputs: Any, feature_axes: int = 1) -> Any:
    """`layer(inputs)`; on a GPU or TPU one row is projected as two.

    Of a product of one row XLA's GPU backend makes multiplications and a sum, unless
    there are ten million weights, and writes to memory what is to be summed or, before
    a loop, transposed weights; on a TPU it doesn't use the matrix units. Two rows stay
    a matrix product, which reads the weights once and, where there are more, costs
    the same.

    On TensorFlow and PyTorch an `EinsumDense` is computed as a product of two matrices:
    their `einsum` is many operations, or a batched product, both slow for one row.

    Args:
        layer: Layer or function that projects row by row.
        inputs: Tensor of rows, such as `(B, T, D)`.
        feature_axes: How many axes a row has.

    Returns:
        What `layer` returns for them.
    """
    if can_trace() and _is_product(layer, feature_axes):
        return _multiply(layer, inputs, feature_axes)
    rows = inputs.shape[:-feature_axes]
    is_one = len(rows) > 0 and all(size == 1 for size in rows)
    if not is_one or not current_platform().doubles_row_of_weights:
        return layer(inputs)
    return layer(ops.broadcast_to(inputs, (2, *inputs.shape[1:])))[:1]


def _is_product(layer, feature_axes):
    """Whether a layer is an `EinsumDense` that multiplies rows with one matrix."""
    if type(layer) is not keras.layers.EinsumDense or not layer.built:
        return False
    if layer.quantization_mode is not None or layer.lora_enabled:
        return False
    if layer.compute_dtype == "float64":
        return False  # Keras' product on PyTorch makes float32 of it.
    given, kernel, result = re.split(",|->", layer.equation)
    free, features = given[:-feature_axes], given[-feature_axes:]
    units, shape = kernel[feature_axes:], layer.kernel.shape[feature_axes:]
    is_matrix = kernel == features + units and set(kernel).isdisjoint(free)
    has_last_bias = layer.bias is None or layer.bias.shape == shape
    is_matrix = is_matrix and result == free + units and has_last_bias
    return is_matrix and layer.activity_regularizer is None


def _multiply(layer, inputs, feature_axes):
    """The output of an `EinsumDense`, by a product of two matrices."""
    inputs = ops.cast(inputs, layer.compute_dtype)
    kernel = ops.cast(layer.kernel, layer.compute_dtype)
    units = kernel.shape[feature_axes:]
    size = math.prod(kernel.shape[:feature_axes])
    rows = ops.shape(inputs)[:-feature_axes]
    product = ops.matmul(
        ops.reshape(inputs, (-1, size)), ops.reshape(kernel, (size, -1))
    )
    output = ops.reshape(product, (*rows, *units))
    if layer.bias is not None:
        output = output + ops.cast(layer.bias, output.dtype)
    return output if layer.activation is None else layer.activation(output)


def make_projection(
    attention: keras.layers.Layer,
    name: str,
    input_shape: Sequence[int | None],
    heads: int,
    head_dim: int,
    activation: str | Callable | None = None,
) -> keras.layers.Layer:
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


def make_output_projection(
    attention: keras.layers.Layer, query_shape: Sequence[int | None]
) -> keras.layers.Layer:
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
