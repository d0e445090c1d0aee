"""The feed-forward part of a decoder block."""

from collections.abc import Callable, Sequence
from typing import Any

import keras

from keras_kvcache.layers.activations import get_activation
from keras_kvcache.layers.adoption import AdoptsParts
from keras_kvcache.layers.initializers import clone_initializer
from keras_kvcache.layers.mixture_of_experts import MixtureOfExperts
from keras_kvcache.layers.projections import project


@keras.saving.register_keras_serializable(package="keras_kvcache")
class FeedForward(AdoptsParts):
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
        intermediate_dim: int,
        activation: str | Callable = "silu",
        gated: bool = True,
        use_bias: bool = False,
        kernel_initializer: Any = "glorot_uniform",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.supports_masking = True
        self.intermediate_dim = intermediate_dim
        self.activation = get_activation(activation)
        self.gated = gated
        self.use_bias = use_bias
        self.kernel_initializer = keras.initializers.get(kernel_initializer)

    def build(self, input_shape: Sequence[int | None]) -> None:
        """Creates the dense layers for inputs of shape `(…, D)`."""
        inner_shape = (*input_shape[:-1], self.intermediate_dim)
        inner_activation = None if self.gated else self.activation
        if self.gated:
            self.gate = self._dense("gate", input_shape, self.intermediate_dim)
        self.intermediate = self._dense(
            "intermediate", input_shape, self.intermediate_dim, inner_activation
        )
        self.output_dense = self._dense(
            "output_dense", inner_shape, input_shape[-1], name="output"
        )

    def _dense(self, part, input_shape, units, activation=None, name=None):
        return self._part(
            part,
            lambda: keras.layers.Dense(
                units,
                activation=activation,
                use_bias=self.use_bias,
                kernel_initializer=clone_initializer(self.kernel_initializer),
                dtype=self.dtype_policy,
                name=name or part,
            ),
            input_shape,
        )

    def call(self, inputs: Any) -> Any:
        """Projects inputs `(…, D)` up, applies the activation, projects down."""
        inner = project(self.intermediate, inputs)
        if self.gated:
            inner = self.activation(project(self.gate, inputs)) * inner
        return project(self.output_dense, inner)

    def compute_output_shape(
        self, input_shape: Sequence[int | None]
    ) -> tuple[int | None, ...]:
        """The shape of `inputs`."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """Constructor arguments."""
        return {
            **super().get_config(),
            "intermediate_dim": self.intermediate_dim,
            "activation": keras.activations.serialize(self.activation),
            "gated": self.gated,
            "use_bias": self.use_bias,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
        }


def make_feedforward(
    intermediate_dim: int,
    gated: bool,
    use_bias: bool,
    num_experts: int | None,
    num_experts_per_token: int | None,
    **options: Any,
) -> keras.layers.Layer:
    """A `FeedForward`, or a `MixtureOfExperts` if there are experts.

    Args:
        intermediate_dim, gated, use_bias: As in `FeedForward`.
        num_experts, num_experts_per_token: As in `MixtureOfExperts`, or `None`.
        **options: Arguments that both have.

    Raises:
        ValueError: Experts are asked for that aren't gated or have biases.
    """
    if num_experts is None:
        return FeedForward(intermediate_dim, gated=gated, use_bias=use_bias, **options)
    if use_bias or not gated:
        raise ValueError(
            "`num_experts` needs gated feed-forward parts without biases. Received: "
            f"num_experts={num_experts}, gated={gated}, use_bias={use_bias}"
        )
    if num_experts_per_token is not None:
        options["num_experts_per_token"] = num_experts_per_token
    return MixtureOfExperts(num_experts, intermediate_dim, **options)
