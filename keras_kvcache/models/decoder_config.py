"""What a decoder's configuration must satisfy."""

import numbers

import keras

from keras_kvcache.layers.normalization import NORMALIZATIONS

POSITION_EMBEDDINGS = ("rotary", "learned")


def complete_config(config):
    """Fills in what depends on other arguments, and refuses what makes no model.

    Args:
        config: Dictionary of all constructor arguments of `DecoderLM`; changed in
            place.

    Raises:
        ValueError: An argument is out of range or doesn't go with another.
    """
    heads, hidden_dim = config["num_query_heads"], config["hidden_dim"]
    if config["num_key_value_heads"] is None:
        config["num_key_value_heads"] = heads
    sizes = (
        "vocabulary_size",
        "num_layers",
        "num_query_heads",
        "hidden_dim",
        "intermediate_dim",
        "num_key_value_heads",
        "max_sequence_length",
    )
    for name in sizes:
        _check_size(name, config[name])
        config[name] = int(config[name])
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
    epsilon = config["layer_norm_epsilon"]
    if not _is_number(epsilon) or not epsilon > 0:
        raise ValueError(
            f"`layer_norm_epsilon` must be a positive number. Received: {epsilon!r}"
        )


def _is_number(value):
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _check_size(name, value):
    is_integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_integer or value <= 0:
        raise ValueError(f"`{name}` must be a positive integer. Received: {value!r}")


def get_initializer(identifier):
    """An initializer by name, config or object; `None` is the usual one, GPT-2's."""
    if identifier is None:
        return keras.initializers.RandomNormal(stddev=0.02)
    return keras.initializers.get(identifier)
