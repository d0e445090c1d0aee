"""Keras layers of a decoder with a cache."""

from keras_kvcache.layers.cached_multi_head_attention import CachedMultiHeadAttention
from keras_kvcache.layers.decoder_block import DecoderBlock
from keras_kvcache.layers.feed_forward import FeedForward
from keras_kvcache.layers.rotary_embedding import RotaryEmbedding

__all__ = [
    "CachedMultiHeadAttention",
    "DecoderBlock",
    "FeedForward",
    "RotaryEmbedding",
]
