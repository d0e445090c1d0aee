"""Language models made of the package's layers."""

from keras_kvcache.models.decoder_config import DecoderConfig, LayerConfig, RopeConfig
from keras_kvcache.models.decoder_lm import DecoderLM
from keras_kvcache.models.encoder_decoder_lm import EncoderDecoderLM

__all__ = [
    "DecoderConfig",
    "DecoderLM",
    "EncoderDecoderLM",
    "LayerConfig",
    "RopeConfig",
]
