"""BART (Lewis et al., 2020, https://arxiv.org/abs/1910.13461)."""

from keras_kvcache.families.family import Family, KerasHub
from keras_kvcache.families.keras_hub_parts import attending_decoder


def _options(backbone):
    return dict(
        max_sequence_length=backbone.max_sequence_length,
        max_encoder_length=backbone.max_sequence_length,
        encoder_vocabulary_size=backbone.vocabulary_size,
        use_embedding_norm=True,
        use_final_norm=False,
    )


def _model_parts(backbone):
    return dict(
        position_table=backbone.decoder_position_embedding,
        embedding_norm=backbone.decoder_embeddings_layer_norm,
    )


_BACKBONE = KerasHub(
    "BartBackbone", _options, attending_decoder, _model_parts, has_encoder=True
)
FAMILY = Family("BART", keras_hub=(_BACKBONE,))
