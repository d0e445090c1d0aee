"""Initializers of layers and models."""

from typing import Any

import keras


def get_initializer(identifier: Any) -> Any:
    """An initializer by name, config or object; `None` is the usual one, GPT-2's."""
    if identifier is None:
        return keras.initializers.RandomNormal(stddev=0.02)
    return keras.initializers.get(identifier)


def clone_initializer(initializer: Any) -> Any:
    """A copy: a Keras initializer gives the same values whenever it is called."""
    return initializer.__class__.from_config(initializer.get_config())
