"""keras-hub's encoder-decoders as an `EncoderDecoderLM`.

The encoder is the backbone's own graph, as far as it goes.
"""

from typing import Any

import keras

from keras_kvcache.families import KerasHub
from keras_kvcache.hub import parts
from keras_kvcache.hub.hub_tokenizer import HubPairTokenizer
from keras_kvcache.models.encoder_decoder_lm import EncoderDecoderLM


def share_encoder_decoder(
    family: KerasHub, causal_lm: Any, max_sequence_length: int, policy: str
) -> EncoderDecoderLM:
    """An `EncoderDecoderLM` that has the very weights of a keras-hub model.

    Args:
        family: Of its backbone.
        causal_lm: The task, or the backbone where there is none.
        max_sequence_length: The most positions, where the model doesn't know fewer.
        policy: Its dtype policy.
    """
    backbone = getattr(causal_lm, "backbone", causal_lm)
    layers, options = backbone.decoder_transformer_layers, family.options(backbone)
    options["max_sequence_length"] = min(
        max_sequence_length, options["max_sequence_length"]
    )
    shared = dict(
        token_embedding=backbone.token_embedding,
        **parts.model_parts(family, backbone),
        **{f"block_{i}": parts.block_parts(family, b) for i, b in enumerate(layers)},
    )
    preprocessor = getattr(causal_lm, "preprocessor", None)
    return EncoderDecoderLM(
        parts=shared,
        encoder=_encoder(backbone),
        vocabulary_size=backbone.vocabulary_size,
        num_layers=len(layers),
        num_query_heads=backbone.num_heads,
        hidden_dim=backbone.hidden_dim,
        intermediate_dim=backbone.intermediate_dim,
        normalize_first=layers[0].normalize_first,
        layer_norm_epsilon=layers[0]._self_attention_layer_norm.epsilon,
        dropout=backbone.dropout,
        **options,
        tokenizer=None if preprocessor is None else HubPairTokenizer(preprocessor),
        dtype=policy,
        name=causal_lm.name,
    )


def _encoder(backbone):
    """The backbone from its encoder's inputs to its encoder's output."""
    inputs = {k: v for k, v in backbone.input.items() if k.startswith("encoder_")}
    return keras.Model(
        inputs, backbone.output["encoder_sequence_output"], name="encoder"
    )
