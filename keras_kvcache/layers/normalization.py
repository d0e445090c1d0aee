"""The normalizations that decoders use."""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_kvcache.attention.products import sum_dtype


@keras.saving.register_keras_serializable(package="keras_kvcache")
class UnitOffsetRMSNormalization(keras.layers.Layer):
    """RMS normalization whose gain is `1 + scale`, as in the Gemma models.

    Args:
        epsilon: Added to the mean square.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: Tensor `(…, D)`.

    Returns:
        A tensor like `inputs`; computed in float32 at least.
    """

    def __init__(self, epsilon: float = 1e-6, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.supports_masking = True
        self.epsilon = epsilon

    def build(self, input_shape: Sequence[int | None]) -> None:
        """Creates the scale, zero at the start."""
        self.scale = self.add_weight(
            name="scale", shape=input_shape[-1:], initializer="zeros"
        )

    def call(self, inputs: Any) -> Any:
        """Normalizes the last axis."""
        dtype = sum_dtype(inputs)
        gain = 1.0 + ops.cast(self.scale, dtype)
        normed = ops.rms_normalization(
            ops.cast(inputs, dtype), scale=gain, epsilon=self.epsilon
        )
        return ops.cast(normed, self.compute_dtype)

    def compute_output_shape(
        self, input_shape: Sequence[int | None]
    ) -> tuple[int | None, ...]:
        """The shape of `inputs`."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """Constructor arguments."""
        return {**super().get_config(), "epsilon": self.epsilon}


NORMALIZATIONS = {
    "rms_norm": keras.layers.RMSNormalization,
    "unit_offset_rms_norm": UnitOffsetRMSNormalization,
    "layer_norm": keras.layers.LayerNormalization,
}


def make_normalization(
    kind: Any, epsilon: float, name: str, dtype: Any
) -> keras.layers.Layer:
    """A normalization layer over the last axis.

    Args:
        kind: `"rms_norm"` (Zhang and Sennrich, 2019,
            https://arxiv.org/abs/1910.07467), `"unit_offset_rms_norm"`, whose
            gain is one plus its weight, or `"layer_norm"`.
        epsilon: Added to the mean square or the variance.
        name: Name of the layer.
        dtype: Its dtype policy.

    Raises:
        ValueError: `kind` is unknown.
    """
    if kind not in NORMALIZATIONS:
        raise ValueError(
            f"`normalization` must be one of {list(NORMALIZATIONS)}. Received: {kind!r}"
        )
    return NORMALIZATIONS[kind](epsilon=epsilon, name=name, dtype=dtype)
