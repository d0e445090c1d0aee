"""The encoder's output as a decoder reads it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from keras_kvcache.caches.descriptions import is_container
from keras_kvcache.layers import DecoderBlock


@is_container
class Encoded(NamedTuple):
    """The encoder's keys and values and their mask, which decoding only reads.

    Attributes:
        caches: Tuple of one cache a layer: the encoder's keys and values, `E` slots.
        padding_mask: Boolean `(B, E)`, `False` for positions to hide, or `None`.
    """

    caches: tuple
    padding_mask: Any = None


def project_encoded(
    blocks: Sequence[DecoderBlock],
    sequence: Any,
    codec: Any = None,
    layout: str = "head_major",
) -> tuple:
    """Projects an encoder's output to the keys and values of each block.

    Args:
        blocks: Decoder blocks built with an encoder.
        sequence: The encoder's output, `(B, E, D')`.
        codec, layout: As in `CachedMultiHeadAttention.cache_spec`.

    Returns:
        A tuple of one static cache a block, full.
    """

    def project(attention):
        entries = attention.project_entries(sequence, None, 0)
        rows, length = sequence.shape[:2]
        spec = attention.cache_spec(rows, length, codec, "static", layout)
        cache, _ = spec.allocate().update(*entries, 0)
        return cache

    return tuple(project(block.cross_attention) for block in blocks)
