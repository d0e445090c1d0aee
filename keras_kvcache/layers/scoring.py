"""How an attention layer makes scores: its arguments, its weights, its `Scoring`."""

import numbers
from typing import Any

import keras
from keras import ops

from keras_kvcache.attention import Scoring
from keras_kvcache.attention.scoring import Alibi
from keras_kvcache.runtime.concrete import is_integer

# Constructor arguments, with the values by which products only are scaled.
ARGUMENTS = {"logit_soft_cap": None, "score_bias": None, "use_sink_logits": False}


# The `score_bias` that needs neither weights nor a function of one's own.
ALIBI = "alibi"


def check_scoring_arguments(layer: keras.layers.Layer) -> None:
    """Refuses constructor arguments by which no scores can be made.

    Raises:
        ValueError: A factor isn't a positive number, the bias is none, or flash
            attention is to make more of products than to scale them.
    """
    for name in ("query_scale", "logit_soft_cap"):
        factor = getattr(layer, name)
        if factor is not None and not (isinstance(factor, numbers.Real) and factor > 0):
            raise ValueError(
                f"`{name}` must be a positive number or `None`. Received: {factor!r}"
            )
    check_bias_and_sinks(layer.score_bias, layer.use_sink_logits)
    asked = next(iter(asked_of_scores(layer)), None)
    if layer._flash_attention and asked is not None:
        raise ValueError(
            f"`{asked}` can't be combined with `flash_attention=True`. "
            f"Received: {asked}={getattr(layer, asked)}"
        )


def check_bias_and_sinks(score_bias: Any, use_sink_logits: Any) -> None:
    """Refuses arguments that are no bias, or don't say whether there are sinks.

    Raises:
        ValueError: One is something else.
    """
    is_count = is_integer(score_bias) and score_bias > 0
    if not (is_count or callable(score_bias) or score_bias in (None, ALIBI)):
        raise ValueError(
            f"`score_bias` must be a positive integer, {ALIBI!r}, a function of "
            f"positions or `None`. Received: {score_bias!r}"
        )
    if not isinstance(use_sink_logits, bool):
        raise ValueError(
            f"`use_sink_logits` must be True or False. Received: {use_sink_logits!r}"
        )


def asked_of_scores(layer: keras.layers.Layer) -> list[str]:
    """Names of the arguments by which products are more than scaled.

    Fused kernels know none of them.
    """
    return [name for name, none in ARGUMENTS.items() if getattr(layer, name) != none]


def build_scoring(layer: keras.layers.Layer) -> None:
    """Creates the weights of scores, which no autocasting makes narrow.

    They are `score_bias_table (N, distances)` and `sink_logits (N,)`, each `None` if it
    isn't asked for.
    """
    options = dict(initializer="zeros", autocast=False)
    heads = layer.num_heads
    if is_integer(layer.score_bias):
        layer.score_bias_table = layer.add_weight(
            name="score_bias_table", shape=(heads, int(layer.score_bias)), **options
        )
    elif isinstance(layer.score_bias, keras.layers.Layer):
        positions = ops.zeros((1, 1, 1, 1), "int32")
        layer.score_bias(positions, positions)  # which builds it
    if layer.use_sink_logits:
        layer.sink_logits = layer.add_weight(
            name="sink_logits", shape=(heads,), **options
        )


def scoring_of(layer: keras.layers.Layer) -> Scoring:
    """The `Scoring` of a layer that is built."""
    bias, sink = layer.score_bias, layer.sink_logits
    if layer.score_bias_table is not None:
        bias = ops.convert_to_tensor(layer.score_bias_table)
    elif bias == ALIBI:
        bias = Alibi(layer.num_heads)
    return Scoring(
        layer._inverse_sqrt_key_dim,
        layer.logit_soft_cap,
        bias,
        None if sink is None else ops.convert_to_tensor(sink),
    )
