"""The config of the decoder of an encoder-decoder model, with one entry a layer."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields

from keras_kvcache.layers.block_config import (
    BlockConfig,
    check_head_dim,
    check_sizes,
    fill_in,
    given,
    shared_fields,
)


@dataclass(frozen=True)
class EncoderDecoderConfig:
    """The arguments of `EncoderDecoderLM`, its encoder and tokenizer apart.

    Attributes have the names and meanings of these arguments; numbers of heads and
    their size are filled in where they are `None`. Besides there is:

    Attributes:
        layers: Tuple of one `BlockConfig` a layer, which follow from the arguments.

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
    max_encoder_length: int | None = None
    encoder_vocabulary_size: int | None = None
    normalization: str = "layer_norm"
    layer_norm_epsilon: float = 1e-5
    normalize_first: bool = True
    activation: str | Callable = "gelu"
    gated_feedforward: bool = False
    use_bias: bool = True
    use_embedding_norm: bool = False
    use_final_norm: bool = True
    dropout: float = 0.0
    layers: tuple[BlockConfig, ...] = field(init=False)

    # Each position has an embedding, so there is an end to them.
    has_last_position = True

    def __post_init__(self):
        names = ("vocabulary_size", "num_layers", "num_query_heads", "hidden_dim")
        check_sizes(self, *names, "intermediate_dim", "max_sequence_length")
        optional = ("num_key_value_heads", "head_dim")
        optional += ("max_encoder_length", "encoder_vocabulary_size")
        check_sizes(self, *given(self, *optional))
        check_head_dim(self)
        fill_in(
            self,
            num_key_value_heads=self.num_query_heads,
            head_dim=self.hidden_dim // self.num_query_heads,
        )
        layer = BlockConfig(**shared_fields(self))
        object.__setattr__(self, "layers", (layer,) * self.num_layers)

    def to_dict(self) -> dict:
        """The arguments that make an equal config."""
        return {each.name: getattr(self, each.name) for each in fields(self)[:-1]}
