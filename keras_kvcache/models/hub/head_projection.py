"""keras-hub's projections of Gemma, as one product a head."""

import keras
from keras import ops


class HeadProjection(keras.layers.Layer):
    """Multiplies as an `EinsumDense` does whose kernel is `(N, D, H)`.

    Summed over its middle axis by a single product, such a kernel is rearranged for
    each token, which takes several times as long as reading it.

    Args:
        projection: `keras.layers.EinsumDense` without a bias, built, `(B, T, D)` to
            `(B, T, N, H)`. What LoRA adds to its kernel counts; once it is quantized
            it computes by itself.

    Call arguments:
        inputs: Tensor `(B, T, D)`.

    Returns:
        A tensor `(B, T, N, H)`.
    """

    def __init__(self, projection):
        super().__init__(dtype=projection.compute_dtype)
        self.projection = projection
        self.built = True

    @property
    def bias(self):
        """That of the projection: none."""
        return self.projection.bias

    def call(self, inputs):
        """See the class."""
        if self.projection.quantization_mode is not None:
            return self.projection(inputs)
        kernel = ops.convert_to_tensor(self.projection.kernel)
        heads, width, head_dim = kernel.shape
        batch, length, _ = ops.shape(inputs)
        tokens = ops.reshape(inputs, (batch * length, width))
        tokens = ops.broadcast_to(tokens, (heads, batch * length, width))
        projected = ops.transpose(ops.matmul(tokens, kernel), (1, 0, 2))
        return ops.reshape(projected, (batch, length, heads, head_dim))
