"""A feed-forward part made of experts, of which each token is given to a few."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from keras_kvcache.layers.activations import get_activation
from keras_kvcache.layers.adoption import AdoptsParts
from keras_kvcache.layers.initializers import clone_initializer
from keras_kvcache.runtime.concrete import is_integer


@keras.saving.register_keras_serializable(package="keras_kvcache")
class Experts(keras.layers.Layer):
    """Gated feed-forward parts without biases, of which each token is given to some.

    A step of decoding costs what it reads. So with few tokens only the experts that
    are chosen are read; with many, of which all are, every expert sees all tokens.

    Args:
        num_experts: `E`.
        intermediate_dim: `F`, width within an expert.
        activation: Of the gates.
        kernel_initializer: Initializer of the kernels.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        tokens: Tensor `(tokens, D)`.
        chosen: Integer tensor `(tokens, C)`: the experts of each token.
        weights: Tensor `(tokens, C)`: what each answer counts.

    Returns:
        A tensor `(tokens, D)`.
    """

    def __init__(
        self,
        num_experts: int | None,
        intermediate_dim: int,
        activation: str | Callable = "silu",
        kernel_initializer: Any = "glorot_uniform",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.num_experts = num_experts
        self.intermediate_dim = intermediate_dim
        self.activation = get_activation(activation)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)

    def build(self, tokens_shape: Sequence[int | None]) -> None:
        """Creates the kernels, `(E, D, F)` and back, for tokens `(…, D)`."""
        widen = (self.num_experts, tokens_shape[-1], self.intermediate_dim)
        narrow = (self.num_experts, self.intermediate_dim, tokens_shape[-1])
        self.gate_kernel = self._kernel("gate_kernel", widen)
        self.intermediate_kernel = self._kernel("intermediate_kernel", widen)
        self.output_kernel = self._kernel("output_kernel", narrow)

    def _kernel(self, name, shape):
        initializer = clone_initializer(self.kernel_initializer)
        return self.add_weight(name=name, shape=shape, initializer=initializer)

    def call(self, tokens: Any, chosen: Any, weights: Any) -> Any:
        """Weighted sums of the chosen experts' outputs, `(tokens, D)`."""
        count, choices = chosen.shape
        if isinstance(count, int) and 2 * count * choices <= self.num_experts:
            return self._ask_chosen(tokens, chosen, weights)
        return self._ask_all(tokens, chosen, weights)

    def _ask_chosen(self, tokens, chosen, weights):
        """Sparse dispatch: gathers the kernels of the chosen experts only."""
        count, choices = chosen.shape
        tokens = ops.repeat(tokens, choices, axis=0)[:, None]
        experts = ops.reshape(chosen, (-1,))

        def pick(kernel):
            return ops.take(ops.convert_to_tensor(kernel), experts, axis=0)

        answers = self._answers(tokens, pick)
        answers = ops.reshape(answers, (count, choices, -1))
        return ops.einsum("tc,tcd->td", weights, answers)

    def _ask_all(self, tokens, chosen, weights):
        """Dense dispatch: all experts run, and those not chosen get weight 0."""
        chosen = ops.one_hot(chosen, self.num_experts, dtype=weights.dtype)
        weights = ops.einsum("tc,tce->te", weights, chosen)
        # With a copy for each expert these are products, one an expert. Without,
        # the kernels would be rearranged for a single one, at many times the cost.
        shape = (self.num_experts, *ops.shape(tokens))
        answers = self._answers(ops.broadcast_to(tokens, shape), ops.convert_to_tensor)
        # Other experts' answers may be infinite, above all in float16: 0 times that
        # is NaN.
        is_asked = ops.transpose(weights)[..., None] != 0
        answers = ops.where(is_asked, answers, ops.zeros_like(answers))
        return ops.einsum("te,etd->td", weights, answers)

    def _answers(self, tokens, pick):
        """Runs experts on tokens, `(experts, any, D)` to the same shape.

        Args:
            tokens: Those of each expert.
            pick: Selects the experts' rows of a kernel `(E, …)`.
        """
        gate = self.activation(ops.matmul(tokens, pick(self.gate_kernel)))
        inner = ops.matmul(tokens, pick(self.intermediate_kernel))
        return ops.matmul(gate * inner, pick(self.output_kernel))

    def compute_output_shape(
        self,
        tokens_shape: Sequence[int | None],
        chosen_shape: Sequence[int | None],
        weights_shape: Sequence[int | None],
    ) -> tuple[int | None, ...]:
        """The shape of `tokens`."""
        return tokens_shape

    def get_config(self) -> dict[str, Any]:
        """Constructor arguments."""
        return {
            **super().get_config(),
            "num_experts": self.num_experts,
            "intermediate_dim": self.intermediate_dim,
            "activation": keras.activations.serialize(self.activation),
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
        }


@keras.saving.register_keras_serializable(package="keras_kvcache")
class MixtureOfExperts(AdoptsParts):
    """Mixes the answers of the experts that a router finds most fit for a token.

    The weights of the chosen ones sum to one (Jiang et al., 2024,
    https://arxiv.org/abs/2401.04088). There is no loss that balances their load.

    Args:
        num_experts: `E`.
        intermediate_dim: Width within an expert.
        num_experts_per_token: How many experts a token is given to.
        activation: Of the experts' gates.
        kernel_initializer: Initializer of the kernels.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: Tensor `(…, D)`.

    Returns:
        A tensor `(…, D)`.

    Raises:
        ValueError: There aren't that many experts.
    """

    def __init__(
        self,
        num_experts: int | None,
        intermediate_dim: int,
        num_experts_per_token: int | None = 2,
        activation: str | Callable = "silu",
        kernel_initializer: Any = "glorot_uniform",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for count in (num_experts, num_experts_per_token):
            if not is_integer(count) or not 0 < count <= num_experts:
                raise ValueError(
                    "`num_experts_per_token` must be a positive integer and at most "
                    "`num_experts`. Received: num_experts_per_token="
                    f"{num_experts_per_token!r}, num_experts={num_experts!r}"
                )
        self.supports_masking = True
        self.num_experts = num_experts
        self.intermediate_dim = intermediate_dim
        self.num_experts_per_token = num_experts_per_token
        self.activation = get_activation(activation)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)

    def build(self, input_shape: Sequence[int | None]) -> None:
        """Creates the router and the experts for inputs `(…, D)`."""
        shape = (None, input_shape[-1])
        self.router = self._part("router", self._make_router, shape)
        self.experts = self._part("experts", self._make_experts, shape)

    def _make_router(self):
        return keras.layers.Dense(
            self.num_experts,
            use_bias=False,
            kernel_initializer=clone_initializer(self.kernel_initializer),
            dtype=self.dtype_policy,
            name="router",
        )

    def _make_experts(self):
        return Experts(
            self.num_experts,
            self.intermediate_dim,
            activation=self.activation,
            kernel_initializer=clone_initializer(self.kernel_initializer),
            dtype=self.dtype_policy,
            name="experts",
        )

    def call(self, inputs: Any) -> Any:
        """Routes each token of `(…, D)` to its experts; returns the same shape."""
        tokens = ops.reshape(inputs, (-1, inputs.shape[-1]))
        fitness = ops.softmax(self.router(tokens), axis=-1)
        fitness, chosen = ops.top_k(fitness, k=self.num_experts_per_token)
        fitness = fitness / ops.sum(fitness, axis=-1, keepdims=True)
        mixed = self.experts(tokens, chosen, fitness)
        return ops.reshape(mixed, ops.shape(inputs))

    def compute_output_shape(
        self, input_shape: Sequence[int | None]
    ) -> tuple[int | None, ...]:
        """The shape of `inputs`."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """Constructor arguments."""
        return {
            **super().get_config(),
            "num_experts": self.num_experts,
            "intermediate_dim": self.intermediate_dim,
            "num_experts_per_token": self.num_experts_per_token,
            "activation": keras.activations.serialize(self.activation),
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
        }
