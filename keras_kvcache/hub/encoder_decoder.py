"""keras-hub's encoder-decoder families, as options of `EncoderDecoderLM`.

A family is a function of a backbone that gives options of `EncoderDecoderLM` and the
parts around its blocks. The encoder is the backbone's own graph, as far as it goes.
"""

import keras

from keras_kvcache.hub import parts
from keras_kvcache.hub.hub_tokenizer import HubPairTokenizer
from keras_kvcache.hub.position_table import PositionTable
from keras_kvcache.models.encoder_decoder_lm import EncoderDecoderLM


def _bart(backbone):
    options = dict(
        max_sequence_length=backbone.max_sequence_length,
        max_encoder_length=backbone.max_sequence_length,
        encoder_vocabulary_size=backbone.vocabulary_size,
        use_embedding_norm=True,
        use_final_norm=False,
    )
    around = dict(
        position_table=PositionTable(backbone.decoder_position_embedding),
        embedding_norm=backbone.decoder_embeddings_layer_norm,
    )
    return options, around


def _whisper(backbone):
    embeddings = backbone.decoder_embeddings
    options = dict(
        max_sequence_length=backbone.max_decoder_sequence_length,
        # Two frames make a position.
        max_encoder_length=backbone.max_encoder_sequence_length // 2 * 2,
    )
    around = dict(
        position_table=PositionTable(embeddings.position_embedding),
        final_norm=backbone.decoder_layer_norm,
    )
    return options, around


ENCODER_DECODERS = {"BartBackbone": _bart, "WhisperBackbone": _whisper}


def share_encoder_decoder(causal_lm, backbone, max_sequence_length, policy):
    """An `EncoderDecoderLM` that has the very weights of a keras-hub model.

    Args:
        causal_lm: The task, or the backbone where there is none.
        backbone: Its backbone, of a family in `ENCODER_DECODERS`.
        max_sequence_length: The most positions, where the model doesn't know fewer.
        policy: Its dtype policy.
    """
    layers = backbone.decoder_transformer_layers
    options, around = ENCODER_DECODERS[type(backbone).__name__](backbone)
    options["max_sequence_length"] = min(
        max_sequence_length, options["max_sequence_length"]
    )
    blocks = {f"block_{i}": parts.attending_decoder(b) for i, b in enumerate(layers)}
    preprocessor = getattr(causal_lm, "preprocessor", None)
    return EncoderDecoderLM(
        parts=dict(token_embedding=backbone.token_embedding, **around, **blocks),
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
