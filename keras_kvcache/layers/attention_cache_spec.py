"""The `CacheSpec` of an attention layer, from its heads, window and dtype."""

from typing import Any

from keras_kvcache.caches import CacheSpec, Codec, get_codec
from keras_kvcache.caches.kinds import Rolling, Static, choose_kind


def attention_cache_spec(
    layer: Any,
    batch_size: int,
    capacity: int,
    codec: str | Codec | None = None,
    kind: str | Static | Rolling = "auto",
    layout: str = "head_major",
) -> CacheSpec:
    """The spec of a cache for an attention layer.

    Args:
        layer: A `CachedMultiHeadAttention`.
        batch_size: `B`.
        capacity: `S`, how many positions it is to take.
        codec: As in `CacheSpec`; `None` for the layer's compute dtype.
        kind: `"static"`, `"rolling"` for the layer's sliding window, a `Rolling`, or
            `"auto"`: rolling if `capacity` outgrows the layer's window, else static.
        layout: `"head_major"` or `"dense"`.

    Raises:
        ValueError: An option is unknown or doesn't suit the layer.
    """
    return CacheSpec(
        batch_size,
        capacity,
        layer.num_key_value_heads,
        layer.key_dim,
        None if layer.value_dim == layer.key_dim else layer.value_dim,
        codec=get_codec(codec, layer.compute_dtype),
        layout=layout,
        kind=choose_kind(kind, layer._sliding_window, capacity),
    )
