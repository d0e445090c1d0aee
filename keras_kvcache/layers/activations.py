"""Activations that language models use and Keras has no name for."""

from collections.abc import Callable
from typing import Any

import keras


@keras.saving.register_keras_serializable(package="keras_kvcache")
def gelu_tanh(x: Any) -> Any:
    """GELU by its tanh approximation (Hendrycks and Gimpel, 2016,
    https://arxiv.org/abs/1606.08415), as GPT-2 was trained with.
    """
    return keras.activations.gelu(x, approximate=True)


def get_activation(identifier: Any) -> Callable:
    """An activation by name, config or function: Keras' own and `"gelu_tanh"`.

    Raises:
        ValueError: The name is unknown.
    """
    return gelu_tanh if identifier == "gelu_tanh" else keras.activations.get(identifier)
