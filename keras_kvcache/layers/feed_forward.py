"""The feed-forward part of a decoder block."""

import keras

from keras_kvcache.layers.activations import get_activation
from keras_kvcache.layers.initializers import clone_initializer


@keras.saving.register_keras_serializable(package="keras_kvcache")
class FeedForward(keras.layers.Layer):
    """Two dense layers with an activation between, optionally gated.

    Gated (Shazeer, 2020, https://arxiv.org/abs/2002.05202):
    `output(activation(gate(x)) * intermediate(x))`; else
    `output(activation(intermediate(x)))`.

    Args:
        intermediate_dim: Width between the two.
        activation: Name or function; `"gelu_tanh"` is GELU's tanh approximation.
        gated: Whether there is a gate.
        use_bias: Whether the dense layers have biases.
        kernel_initializer: Initializer of the kernels.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: Tensor `(…, D)`.

    Returns:
        A tensor `(…, D)`.
    """

    def __init__(
        self,
        intermediate_dim,
        activation="silu",
        gated=True,
        use_bias=False,
        kernel_initializer="glorot_uniform",
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.supports_masking = True
        self.intermediate_dim = intermediate_dim
        self.activation = get_activation(activation)
        self.gated = gated
        self.use_bias = use_bias
        self.kernel_initializer = keras.initializers.get(kernel_initializer)

    def build(self, input_shape):
        """Creates the dense layers for inputs of shape `(…, D)`."""
        inner_shape = (*input_shape[:-1], self.intermediate_dim)
        if self.gated:
            self.gate = self._dense("gate", self.intermediate_dim)
            self.gate.build(input_shape)
        self.intermediate = self._dense("intermediate", self.intermediate_dim)
        self.intermediate.build(input_shape)
        self.output_dense = self._dense("output", input_shape[-1])
        self.output_dense.build(inner_shape)

    def _dense(self, name, units):
        return keras.layers.Dense(
            units,
            use_bias=self.use_bias,
            kernel_initializer=clone_initializer(self.kernel_initializer),
            dtype=self.dtype_policy,
            name=name,
        )

    def call(self, inputs):
        """See the class."""
        inner = self.intermediate(inputs)
        if self.gated:
            inner = self.activation(self.gate(inputs)) * inner
        else:
            inner = self.activation(inner)
        return self.output_dense(inner)

    def compute_output_shape(self, input_shape):
        """The shape of `inputs`."""
        return input_shape

    def get_config(self):
        """Constructor arguments."""
        return {
            **super().get_config(),
            "intermediate_dim": self.intermediate_dim,
            "activation": keras.activations.serialize(self.activation),
            "gated": self.gated,
            "use_bias": self.use_bias,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
        }
