"""The config of one decoder block, and checks that all configs share."""

import numbers
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any

import keras

from keras_kvcache.layers.normalization import NORMALIZATIONS
from keras_kvcache.layers.scoring import check_bias_and_sinks
from keras_kvcache.runtime.concrete import is_integer

# Fields that configs of saved models and blocks need not have.
YOUNG = ("attention_kind", "score_bias", "use_sink_logits", "layer_options")


@dataclass(frozen=True)
class BlockConfig:
    """The arguments of `DecoderBlock`, its rotation and initializer apart.

    Attributes have the names and meanings of these arguments. A bias, an epsilon or a
    number of heads that another argument gives when it's `None` is filled in.

    Raises:
        ValueError: A value is out of range or doesn't go with another.
    """

    num_query_heads: int
    intermediate_dim: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    normalization: str = "rms_norm"
    layer_norm_epsilon: float = 1e-5
    activation: str | Callable = "silu"
    gated_feedforward: bool = True
    use_bias: bool = False
    attention_bias: bool | None = None
    sliding_window: int | None = None
    query_scale: float | None = None
    logit_soft_cap: float | None = None
    query_key_norm: bool = False
    query_key_norm_epsilon: float | None = None
    use_post_attention_norm: bool = False
    use_post_ffw_norm: bool = False
    num_experts: int | None = None
    num_experts_per_token: int | None = None
    dropout: float = 0.0
    normalize_first: bool = True
    attention_kind: str = "multi_head"
    score_bias: int | str | Callable | None = None
    use_sink_logits: bool = False

    def __post_init__(self):
        read_scores(self)
        fill_in(
            self,
            num_key_value_heads=self.num_query_heads,
            attention_bias=self.use_bias,
            query_key_norm_epsilon=self.layer_norm_epsilon,
        )
        check_sizes(self, "num_query_heads", "intermediate_dim", "num_key_value_heads")
        check_sizes(self, *given(self, "head_dim", "num_experts"))
        check_sizes(self, *given(self, "num_experts_per_token"))
        if self.num_query_heads % self.num_key_value_heads:
            raise ValueError(
                "`num_query_heads` must be a multiple of `num_key_value_heads`. "
                f"Received: num_query_heads={self.num_query_heads}, "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        check_choice(self, "normalization", NORMALIZATIONS)
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ValueError(
                f"`dropout` must be from 0 to below 1. Received: {self.dropout!r}"
            )
        check_positive(self, "layer_norm_epsilon", "query_key_norm_epsilon")
        check_needed(self, num_experts_per_token="num_experts")

    def to_dict(self) -> dict[str, Any]:
        """The arguments that make an equal config, without young ones at defaults."""
        return write_score_bias(without_young(self, dict(vars(self))))


def without_young(config: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Leaves out arguments younger than saved models where they change nothing.

    So what is saved today is, of yesterday's models, what was saved yesterday.

    Args:
        config: A dataclass.
        arguments: Its fields by name.
    """
    usual = {each.name: each.default for each in fields(config) if each.name in YOUNG}
    return {
        name: value
        for name, value in arguments.items()
        if name not in usual or value != usual[name]
    }


def shared_fields(config: Any) -> dict:
    """The fields of a model's config that a `BlockConfig` has too, by name."""
    names = {field.name for field in fields(BlockConfig)}
    return {
        field.name: getattr(config, field.name)
        for field in fields(config)
        if field.name in names
    }


def read_scores(config: Any) -> None:
    """Checks the bias and the sinks of a frozen config, and reads a saved bias."""
    bias = read_score_bias(config.score_bias)
    check_bias_and_sinks(bias, config.use_sink_logits)
    object.__setattr__(config, "score_bias", int(bias) if is_integer(bias) else bias)


def read_score_bias(bias: Any) -> Any:
    """Makes a function or layer of what a saved config has in its place."""
    is_saved = isinstance(bias, dict)
    return keras.saving.deserialize_keras_object(bias) if is_saved else bias


def write_score_bias(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments, with what JSON can hold in the place of a function or layer."""
    written, bias = dict(arguments), arguments.get("score_bias")
    if callable(bias):
        written["score_bias"] = keras.saving.serialize_keras_object(bias)
    return written


def fill_in(config: Any, **defaults: Any) -> None:
    """Sets the fields of a frozen dataclass that are `None`."""
    for name, value in defaults.items():
        if getattr(config, name) is None:
            object.__setattr__(config, name, value)


def check_sizes(config: Any, *names: str) -> None:
    """Refuses fields that aren't positive integers; NumPy's become Python's.

    Raises:
        ValueError: One isn't.
    """
    for name in names:
        value = getattr(config, name)
        if not is_integer(value) or value <= 0:
            raise ValueError(
                f"`{name}` must be a positive integer. Received: {value!r}"
            )
        object.__setattr__(config, name, int(value))


def check_head_dim(config: Any) -> None:
    """Refuses a width that doesn't divide into heads, unless their size is given.

    Raises:
        ValueError: It doesn't.
    """
    if config.head_dim is None and config.hidden_dim % config.num_query_heads:
        raise ValueError(
            "`hidden_dim` must be a multiple of `num_query_heads` unless `head_dim` is "
            f"given. Received: hidden_dim={config.hidden_dim}, "
            f"num_query_heads={config.num_query_heads}"
        )


def check_choice(config: Any, name: str, known: Collection[str]) -> None:
    """Refuses a field that isn't one of the known names.

    Raises:
        ValueError: It isn't.
    """
    value = getattr(config, name)
    if value not in known:
        raise ValueError(f"`{name}` must be one of {list(known)}. Received: {value!r}")


def check_positive(config: Any, *names: str) -> None:
    """Refuses fields that are neither positive numbers nor `None`.

    Raises:
        ValueError: One isn't.
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and not (_is_number(value) and value > 0):
            raise ValueError(f"`{name}` must be a positive number. Received: {value!r}")


def check_needed(config: Any, **needed: str) -> None:
    """Refuses fields that are given where the one that they need isn't.

    Args:
        config: A dataclass.
        **needed: By the name of a field that of the field that it needs.

    Raises:
        ValueError: One is given alone.
    """
    for name, other in needed.items():
        if getattr(config, name) is not None and getattr(config, other) is None:
            raise ValueError(
                f"`{name}` means nothing without `{other}`. Received: "
                f"{name}={getattr(config, name)}, {other}=None"
            )


def given(config: Any, *names: str) -> list[str]:
    """Those of the names whose fields aren't `None`."""
    return [name for name in names if getattr(config, name) is not None]


def _is_number(value):
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
