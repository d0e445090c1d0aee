"""What a decoder's configuration must satisfy."""

import numbers

import keras

from keras_kvcache.layers.normalization import NORMALIZATIONS
from keras_kvcache.ops import is_integer

POSITION_EMBEDDINGS = ("rotary", "learned")


def complete_config(config):
    """Fills in what depends on other arguments, and refuses what makes no model.

    Args:
        config: Dictionary of all constructor arguments of `DecoderLM`; changed in
            place.

    Raises:
        ValueError: An argument is out of range or doesn't go with another.
    """
    if config["num_key_value_heads"] is None:
        config["num_key_value_heads"] = config["num_query_heads"]
    _check_sizes(config)
    for name, default in (
        ("query_key_norm_epsilon", "layer_norm_epsilon"),
        ("final_norm_epsilon", "layer_norm_epsilon"),
        ("attention_bias", "use_bias"),
    ):
        if config[name] is None:
            config[name] = config[default]
    _check_values(config)


def _check_sizes(config):
    """Refuses sizes that aren't positive or don't divide each other."""
    sizes = (
        "vocabulary_size",
        "num_layers",
        "num_query_heads",
        "hidden_dim",
        "intermediate_dim",
        "num_key_value_heads",
        "max_sequence_length",
    )
    optional = ("sliding_window_pattern", "num_experts", "num_experts_per_token")
    for name in (*sizes, *(name for name in optional if config[name] is not None)):
        _check_size(name, config[name])
        config[name] = int(config[name])
    heads, hidden_dim = config["num_query_heads"], config["hidden_dim"]
    if config["head_dim"] is None:
        if hidden_dim % heads:
            raise ValueError(
                "`hidden_dim` must be a multiple of `num_query_heads` unless "
                f"`head_dim` is given. Received: hidden_dim={hidden_dim}, "
                f"num_query_heads={heads}"
            )
        config["head_dim"] = hidden_dim // heads
    _check_size("head_dim", config["head_dim"])
    group_heads = config["num_key_value_heads"]
    if heads % group_heads:
        raise ValueError(
            "`num_query_heads` must be a multiple of `num_key_value_heads`. Received: "
            f"num_query_heads={heads}, num_key_value_heads={group_heads}"
        )


def _check_values(config):
    """Refuses names that are unknown, numbers out of range, what goes alone."""
    choices = {
        "normalization": list(NORMALIZATIONS),
        "position_embedding": list(POSITION_EMBEDDINGS),
    }
    for name, known in choices.items():
        if config[name] not in known:
            raise ValueError(
                f"`{name}` must be one of {known}. Received: {config[name]!r}"
            )
    if not _is_number(config["dropout"]) or not 0 <= config["dropout"] < 1:
        raise ValueError(
            f"`dropout` must be from 0 to below 1. Received: {config['dropout']!r}"
        )
    for name in (
        "layer_norm_epsilon",
        "query_key_norm_epsilon",
        "final_norm_epsilon",
        "embedding_scale",
    ):
        value = config[name]
        if value is not None and not (_is_number(value) and value > 0):
            raise ValueError(f"`{name}` must be a positive number. Received: {value!r}")
    needed = {
        "sliding_window_pattern": "sliding_window",
        "rope_local_max_wavelength": "sliding_window",
        "num_experts_per_token": "num_experts",
    }
    for name, other in needed.items():
        if config[name] is not None and config[other] is None:
            raise ValueError(
                f"`{name}` means nothing without `{other}`. Received: "
                f"{name}={config[name]}, {other}=None"
            )


def window_of_layer(config, index):
    """`W` of the layer of this number, or `None` if it attends everything."""
    pattern = config["sliding_window_pattern"]
    slides = pattern is None or (index + 1) % pattern != 0
    return config["sliding_window"] if slides else None


def _is_number(value):
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _check_size(name, value):
    if not is_integer(value) or value <= 0:
        raise ValueError(f"`{name}` must be a positive integer. Received: {value!r}")


def get_initializer(identifier):
    """An initializer by name, config or object; `None` is the usual one, GPT-2's."""
    if identifier is None:
        return keras.initializers.RandomNormal(stddev=0.02)
    return keras.initializers.get(identifier)
