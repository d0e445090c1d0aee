"""Whisper (Radford et al., 2023, https://arxiv.org/abs/2212.04356)."""

from keras_kvcache.families.family import Family, KerasHub
from keras_kvcache.families.keras_hub_parts import attending_decoder


def _options(backbone):
    return dict(
        max_sequence_length=backbone.max_decoder_sequence_length,
        # Two frames make a position.
        max_encoder_length=backbone.max_encoder_sequence_length // 2 * 2,
    )


def _model_parts(backbone):
    return dict(
        position_table=backbone.decoder_embeddings.position_embedding,
        final_norm=backbone.decoder_layer_norm,
    )


_BACKBONE = KerasHub(
    "WhisperBackbone",
    _options,
    attending_decoder,
    _model_parts,
    knows="num_mels max_encoder_sequence_length max_decoder_sequence_length".split(),
    has_encoder=True,
    has_task=False,
)
FAMILY = Family("Whisper", keras_hub=(_BACKBONE,))
