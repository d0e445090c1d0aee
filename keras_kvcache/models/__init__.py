"""A decoder language model made of the package's layers."""

from keras_kvcache.models.decoder_lm import DecoderLM

__all__ = ["DecoderLM"]
