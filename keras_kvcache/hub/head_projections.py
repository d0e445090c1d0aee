"""keras-hub's projections, computed without rearranging their kernels.

An einsum that sums over other axes than the first ones of its kernel, or over two in
another order than they lie in, makes XLA rearrange the kernel for each token, which
takes several times as long as reading it.
"""

import abc
from typing import Any

import keras
from keras import ops


class Projection(keras.layers.Layer, abc.ABC):
    """Multiplies as an `EinsumDense` of keras-hub's does.

    Args:
        projection: `keras.layers.EinsumDense`, built. What LoRA adds to its kernel
            counts; once it is quantized it computes by itself.

    Attributes:
        source: That layer, whose weights these are.
    """

    def __init__(self, projection):
        super().__init__(dtype=projection.compute_dtype)
        self.source = projection
        self.built = True

    @property
    def bias(self) -> Any:
        """That of the projection, or `None`."""
        return self.source.bias

    def call(self, inputs):
        """Projects inputs as the layer of keras-hub does."""
        if self.source.quantization_mode is not None:
            return self.source(inputs)
        outputs = self.multiply(inputs, ops.convert_to_tensor(self.source.kernel))
        return outputs if self.bias is None else outputs + self.bias

    @abc.abstractmethod
    def multiply(self, inputs: Any, kernel: Any) -> Any:
        """The product of inputs and the kernel."""


class HeadProjection(Projection):
    """`(B, T, D)` to `(B, T, N, H)` by a kernel `(N, D, H)`: one product a head."""

    def multiply(self, inputs: Any, kernel: Any) -> Any:
        heads, width, head_dim = kernel.shape
        batch, length, _ = ops.shape(inputs)
        tokens = ops.reshape(inputs, (batch * length, width))
        tokens = ops.broadcast_to(tokens, (heads, batch * length, width))
        projected = ops.transpose(ops.matmul(tokens, kernel), (1, 0, 2))
        return ops.reshape(projected, (batch, length, heads, head_dim))


class OutputProjection(Projection):
    """`(B, T, N, H)` to `(B, T, D)` by a kernel `(N, H, D)`: heads side by side."""

    def multiply(self, inputs: Any, kernel: Any) -> Any:
        heads, head_dim, width = kernel.shape
        batch, length, _, _ = ops.shape(inputs)
        tokens = ops.reshape(inputs, (batch, length, heads * head_dim))
        return ops.matmul(tokens, ops.reshape(kernel, (heads * head_dim, width)))
