"""The config of a decoder, with one entry a layer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from keras_kvcache.layers.block_config import (
    BlockConfig,
    check_choice,
    check_head_dim,
    check_needed,
    check_positive,
    check_sizes,
    fill_in,
    given,
    read_score_bias,
    read_scores,
    shared_fields,
    without_young,
    write_score_bias,
)

POSITION_EMBEDDINGS = ("rotary", "learned", "none")
OPTIONAL_SIZES = (
    "num_key_value_heads",
    "head_dim",
    "num_experts",
    "num_experts_per_token",
)


@dataclass(frozen=True)
class RopeConfig:
    """How a layer rotates queries and keys: arguments of `RotaryEmbedding`."""

    max_wavelength: float = 10000.0
    scaling_factor: float = 1.0
    rotary_dim: int | None = None
    frequency_factors: tuple[float, ...] | None = None

    def __post_init__(self):
        if self.frequency_factors is not None:
            factors = tuple(map(float, self.frequency_factors))
            object.__setattr__(self, "frequency_factors", factors)


@dataclass(frozen=True)
class LayerConfig(BlockConfig):
    """A decoder's layer: its block, and its rotation, if it has one."""

    rope: RopeConfig | None = None


@dataclass(frozen=True)
class DecoderConfig:
    """The arguments of `DecoderLM` that say how it computes, and what they come to.

    Attributes have the names and meanings of these arguments; those that another one
    gives when they are `None` are filled in. Besides there is:

    Attributes:
        layers: Tuple of one `LayerConfig` a layer, which follow from the arguments.

    Raises:
        ValueError: A value is out of range or doesn't go with another.
    """

    vocabulary_size: int
    num_layers: int
    num_query_heads: int
    hidden_dim: int
    intermediate_dim: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_sequence_length: int = 1024
    normalization: str = "rms_norm"
    layer_norm_epsilon: float = 1e-5
    activation: str | Callable = "silu"
    gated_feedforward: bool = True
    use_bias: bool = False
    attention_bias: bool | None = None
    query_scale: float | None = None
    query_key_norm: bool = False
    query_key_norm_epsilon: float | None = None
    use_post_attention_norm: bool = False
    use_post_ffw_norm: bool = False
    num_experts: int | None = None
    num_experts_per_token: int | None = None
    final_norm_epsilon: float | None = None
    position_embedding: str = "rotary"
    rope_max_wavelength: float = 10000.0
    rope_position_scaling_factor: float = 1.0
    rope_frequency_factors: Sequence[float] | None = None
    rotary_dim: int | None = None
    rope_local_max_wavelength: float | None = None
    rope_local_position_scaling_factor: float = 1.0
    embedding_scale: float | None = None
    tie_word_embeddings: bool = True
    sliding_window: int | None = None
    sliding_window_pattern: int | None = None
    attention_logit_soft_cap: float | None = None
    final_logit_soft_cap: float | None = None
    dropout: float = 0.0
    has_last_position: bool | None = None
    attention_kind: str = "multi_head"
    score_bias: int | str | Callable | None = None
    use_sink_logits: bool = False
    layer_options: Sequence[Mapping[str, Any]] | None = None
    layers: tuple[LayerConfig, ...] = field(init=False)

    def __post_init__(self):
        names = ("vocabulary_size", "num_layers", "num_query_heads", "hidden_dim")
        check_sizes(self, *names, "max_sequence_length")
        check_sizes(self, "intermediate_dim", *given(self, *OPTIONAL_SIZES))
        check_head_dim(self)
        read_scores(self)
        if self.head_dim is None:
            fill_in(self, head_dim=self.hidden_dim // self.num_query_heads)
        unfilled = shared_fields(self)
        fill_in(
            self,
            num_key_value_heads=self.num_query_heads,
            attention_bias=self.use_bias,
            query_key_norm_epsilon=self.layer_norm_epsilon,
            final_norm_epsilon=self.layer_norm_epsilon,
            has_last_position=self._ends_by_nature,
        )
        check_choice(self, "position_embedding", POSITION_EMBEDDINGS)
        check_positive(
            self, "layer_norm_epsilon", "final_norm_epsilon", "embedding_scale"
        )
        check_needed(
            self,
            sliding_window_pattern="sliding_window",
            rope_local_max_wavelength="sliding_window",
        )
        if self.sliding_window_pattern is not None:
            check_sizes(self, "sliding_window_pattern")
        if self._ends_by_nature and not self.has_last_position:
            raise ValueError(
                "`has_last_position` can't be false where positions are learned. "
                f"Received: {self.has_last_position}"
            )
        object.__setattr__(self, "layers", self._make_layers(unfilled))

    @property
    def _ends_by_nature(self):
        return self.position_embedding == "learned"

    def _make_layers(self, unfilled):
        own = [{}] * self.num_layers
        if self.layer_options is not None:
            if len(self.layer_options) != self.num_layers:
                raise ValueError(
                    "`layer_options` must be one dictionary a layer, "
                    f"{self.num_layers}. Received: {len(self.layer_options)}"
                )
            own = tuple(map(dict, self.layer_options))
            for options in own:
                if "score_bias" in options:
                    options["score_bias"] = read_score_bias(options["score_bias"])
            object.__setattr__(self, "layer_options", own)
        return tuple(
            self._make_layer(index, unfilled, options)
            for index, options in enumerate(own)
        )

    def _make_layer(self, index, unfilled, options):
        """A layer's config: what its own options don't say is the model's."""
        pattern = self.sliding_window_pattern
        slides = pattern is None or (index + 1) % pattern != 0
        window = self.sliding_window if slides else None
        usual = dict(
            unfilled,
            sliding_window=window,
            logit_soft_cap=self.attention_logit_soft_cap,
            rope=self._rope(is_local=window is not None),
        )
        check_names("layer_options", options, LayerConfig)
        options = dict(options)
        if options.get("rope") is not None:
            check_names("rope", options["rope"], RopeConfig)
            options["rope"] = RopeConfig(**options["rope"])
        return LayerConfig(**{**usual, **options})

    def _rope(self, is_local):
        if self.position_embedding != "rotary":
            return None
        if is_local and self.rope_local_max_wavelength is not None:
            return RopeConfig(
                self.rope_local_max_wavelength,
                self.rope_local_position_scaling_factor,
                self.rotary_dim,
            )
        return RopeConfig(
            self.rope_max_wavelength,
            self.rope_position_scaling_factor,
            self.rotary_dim,
            self.rope_frequency_factors,
        )

    def to_dict(self) -> dict:
        """The arguments that make an equal config, as JSON can hold them.

        Arguments that are younger than saved models are left out where they change
        nothing, so that a model's config stays what it was.
        """
        arguments = {
            each.name: getattr(self, each.name) for each in fields(self) if each.init
        }
        if self.rope_frequency_factors is not None:
            arguments["rope_frequency_factors"] = list(self.rope_frequency_factors)
        if arguments["has_last_position"] == self._ends_by_nature:
            del arguments["has_last_position"]
        if self.layer_options is not None:
            options = (write_score_bias(each) for each in self.layer_options)
            arguments["layer_options"] = list(options)
        return write_score_bias(without_young(self, arguments))


def check_names(argument: str, options: Any, config: Any) -> None:
    """Refuses what is no dictionary of fields of a config.

    Raises:
        ValueError: It's something else.
    """
    names = [each.name for each in fields(config)]
    if not isinstance(options, Mapping) or options.keys() - set(names):
        raise ValueError(
            f"`{argument}` must have names of the fields of `{config.__name__}`, "
            f"{names}. Received: {options!r}"
        )
