"""Configs and weight files that say which layers were quantized, and how.

`quantize` changes which weights a layer has. Keras saves the quantization of a layer in
its config. Layers that another layer makes within itself are in no config, so that one
must save their quantization.
"""

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import keras
import numpy as np

# The key in a config, and beside the weights that a layer stores.
KEY = "quantization"


class KeepsQuantization(keras.layers.Layer):
    """A layer that saves how the layers that it makes within itself were quantized.

    Args:
        quantization: The result of `quantized_layers` for an equal layer, by which
            parts are made with quantized weights; `None` for none.
        *args, **kwargs: Arguments of the layer.
    """

    _quantization = MappingProxyType({})

    def __init__(
        self, *args: Any, quantization: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        # Keras would track a dictionary; it leaves a proxy alone.
        self._quantization = MappingProxyType(quantization or {})
        super().__init__(*args, **kwargs)

    def _hand_down(self, part):
        """Tells a part that isn't built yet how it was quantized."""
        if isinstance(part, KeepsQuantization):
            part._quantization = MappingProxyType(_below(part.name, self._quantization))
        elif part.name in self._quantization:
            _set_policy(part, **self._quantization[part.name])

    def get_config(self) -> dict[str, Any]:
        """Constructor arguments, `quantization` among them where there is any."""
        found = quantized_layers(self)
        return {**super().get_config(), **({KEY: found} if found else {})}

    def save_own_variables(self, store: Any) -> None:
        """As in Keras, with the quantization of the parts that are in the same file."""
        super().save_own_variables(store)
        found = quantized_layers(self, recursive=False)
        if found:
            store[KEY] = np.frombuffer(json.dumps(found).encode(), "uint8")

    def load_own_variables(self, store: Any) -> None:
        """As in Keras, after quantizing the parts as those in the file were.

        Raises:
            ValueError: A part was quantized in a way that needs its config.
        """
        names = list(store.keys())
        if KEY in names:
            names.remove(KEY)
            quantize_built(self, json.loads(bytes(np.asarray(store[KEY]))))
        super().load_own_variables({name: store[name] for name in names})


def quantized_layers(layer: keras.layers.Layer, recursive: bool = True) -> Any:
    """Describes which sublayers of a layer are quantized, and how.

    Args:
        layer: The layer.
        recursive: Whether to look into the layers within it, too.

    Returns:
        A dictionary that JSON can hold: by the names on the way to a layer, such as
        `"attention/query"`, its `"mode"`, such as `"int8"`, and the `"config"` that
        `quantize` was given.
    """
    found = {}
    for part in layer._flatten_layers(include_self=False, recursive=False):
        if part._flatten_layers(include_self=False):
            if recursive:
                inner = quantized_layers(part).items()
                found |= {f"{part.name}/{path}": how for path, how in inner}
        elif part.quantization_mode is not None:
            found[part.name] = quantization_of(part)
    return found


def quantization_of(layer: keras.layers.Layer) -> Any:
    """How a layer is quantized, in the form of the values of `quantized_layers`."""
    config = getattr(layer, "quantization_config", None)
    return {
        "mode": _policy_of(layer).get_config()["mode"],
        "config": keras.saving.serialize_keras_object(config),
    }


def quantize_built(layer: keras.layers.Layer, described: Mapping[str, Any]) -> None:
    """Quantizes built layers, except those that are quantized already.

    Args:
        layer: The layer that they are within.
        described: The result of `quantized_layers` for an equal layer.

    Raises:
        ValueError: A layer can only be quantized by looking at data.
    """
    for part in layer._flatten_layers(include_self=False, recursive=False):
        if part.name in described and part.quantization_mode is None:
            mode, config = described[part.name]["mode"], described[part.name]["config"]
            if mode.partition("/")[0] in ("gptq", "awq"):
                raise ValueError(
                    "A model must be made from its config before weights of the mode "
                    f"{mode} can be loaded. Received: {part.path}, not quantized"
                )
            quantize_layer(part, mode, config)
        inner = _below(part.name, described)
        if inner:
            quantize_built(part, inner)


def quantize_layer(layer: keras.layers.Layer, mode: str, config: Any) -> None:
    """Quantizes a built layer.

    Args:
        layer: The layer.
        mode: As `quantization_of` tells it of an equal layer; so is `config`.
    """
    mode, _, block_size = mode.partition("/")
    config = keras.saving.deserialize_keras_object(config)
    if config is None and block_size:
        # Of a layer that was built with this policy, and never was `quantize`d.
        config = keras.quantizers.Int4QuantizationConfig(block_size=int(block_size))
    layer.quantize(mode, config=config)
    if keras.backend.backend() == "torch":
        layer._track_variables()  # It still holds the weights before.


def _below(name, described):
    """The entries of a description for sublayers of the layer of this name."""
    prefix = f"{name}/"
    return {
        path.removeprefix(prefix): how
        for path, how in described.items()
        if path.startswith(prefix)
    }


def _set_policy(layer, mode, config):
    """Makes a layer that isn't built yet build quantized weights."""
    policy = f"{mode}_from_{_policy_of(layer).name}"
    layer.dtype_policy = keras.dtype_policies.get(policy)
    layer.quantization_config = keras.saving.deserialize_keras_object(config)


def _policy_of(layer):
    """A layer's own dtype policy, taken out of a map of policies if need be."""
    policy = layer.dtype_policy
    if isinstance(policy, keras.dtype_policies.DTypePolicyMap):
        policy = policy[layer.path]
    return policy
