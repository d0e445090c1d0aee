"""Rotary position embedding as a layer, to be given to an attention layer."""

import numbers
from collections.abc import Sequence
from typing import Any

import keras

from keras_kvcache.attention import inverse_frequencies, rotate


@keras.saving.register_keras_serializable(package="keras_kvcache")
class RotaryEmbedding(keras.layers.Layer):
    """Rotates queries or keys by their positions.

    Method: Su et al., 2021, https://arxiv.org/abs/2104.09864, pairing component
    `j` with `j + rotary_dim / 2`, as Llama's published weights have it.

    Args:
        max_wavelength: Base of the frequencies ("rope theta").
        scaling_factor: Positions are divided by it (linear interpolation, Chen
            et al., 2023, https://arxiv.org/abs/2306.15595).
        rotary_dim: How many of the `H` components are rotated, from the first
            on; even. `None` for all.
        frequency_factors: `rotary_dim // 2` numbers that divide the frequencies,
            for long-context scaling. `None` for none.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: Tensor `(B, T, heads, H)`.
        positions: Integer tensor `(1 | B, T)`.

    Returns:
        A tensor like `inputs`.
    """

    def __init__(
        self,
        max_wavelength: float = 10000.0,
        scaling_factor: float = 1.0,
        rotary_dim: int | None = None,
        frequency_factors: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.supports_masking = True
        for name, value in (
            ("max_wavelength", max_wavelength),
            ("scaling_factor", scaling_factor),
        ):
            if not isinstance(value, numbers.Real) or not value > 0:
                raise ValueError(
                    f"`{name}` must be a positive number. Received: {value!r}"
                )
        if rotary_dim is not None and (rotary_dim <= 0 or rotary_dim % 2):
            raise ValueError(
                f"`rotary_dim` must be positive and even. Received: {rotary_dim}"
            )
        self.max_wavelength = max_wavelength
        self.scaling_factor = scaling_factor
        self.rotary_dim = rotary_dim
        if frequency_factors is not None:
            frequency_factors = [float(factor) for factor in frequency_factors]
            if not all(factor > 0 for factor in frequency_factors):
                raise ValueError(
                    "`frequency_factors` must be positive numbers. Received: "
                    f"{frequency_factors}"
                )
        self.frequency_factors = frequency_factors

    def build(self, input_shape: Sequence[int | None]) -> None:
        """Checks the rotated dimension and the factors against the head size."""
        rotary_dim = self.rotary_dim or input_shape[-1]
        if rotary_dim > input_shape[-1] or rotary_dim % 2:
            raise ValueError(
                "`rotary_dim` must be even and at most the head size H. Received: "
                f"rotary_dim={rotary_dim}, H={input_shape[-1]}"
            )
        factors = self.frequency_factors
        if factors is not None and len(factors) != rotary_dim // 2:
            raise ValueError(
                "`frequency_factors` must have one number a rotated pair, "
                f"{rotary_dim // 2}. Received: {len(factors)}"
            )

    def call(self, inputs: Any, positions: Any) -> Any:
        """Rotates `inputs` `(B, T, heads, H)` by their positions."""
        frequencies = inverse_frequencies(
            self.rotary_dim or inputs.shape[-1],
            self.max_wavelength,
            self.frequency_factors,
        )
        return rotate(inputs, positions, frequencies / self.scaling_factor)

    def compute_output_shape(
        self, input_shape: Sequence[int | None]
    ) -> tuple[int | None, ...]:
        """The shape of `inputs`."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """Constructor arguments."""
        return {
            **super().get_config(),
            "max_wavelength": self.max_wavelength,
            "scaling_factor": self.scaling_factor,
            "rotary_dim": self.rotary_dim,
            "frequency_factors": self.frequency_factors,
        }
