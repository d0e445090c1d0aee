"""The `cache` argument of `generate`: kind, codec and layout."""

from keras_kvcache.attention.codecs import Codec
from keras_kvcache.cache_names import CODED, FLOATS, KINDS
from keras_kvcache.caches.kinds import Rolling, Static

OPTIONS = ("kind", "codec", "layout")


def read_options(cache):
    """Options of `DecoderLM.init_cache` from the short forms of `generate(cache=…)`.

    Args:
        cache: The name of a kind or of a codec, a `Static`, a `Rolling`, a `Codec`,
            a dictionary of `"kind"`, `"codec"` and `"layout"`, or `None`.

    Returns:
        A dictionary with some of these keys.

    Raises:
        ValueError: A name or a key is unknown.
    """
    if cache is None:
        return {}
    if isinstance(cache, dict):
        unknown = sorted(set(cache) - set(OPTIONS))
        if unknown:
            raise ValueError(
                f"`cache` may have the keys {list(OPTIONS)}. Received: {unknown}"
            )
        return dict(cache)
    name = cache if isinstance(cache, str) else None
    if isinstance(cache, Codec) or name in (*FLOATS, *CODED):
        return {"codec": cache}
    if isinstance(cache, (Static, Rolling)) or name in KINDS:
        return {"kind": cache}
    raise ValueError(
        f"`cache` must be one of {[*KINDS, *FLOATS, *CODED]}, an object of these, or "
        f"a dictionary. Received: {cache!r}"
    )


def choose_kind(kind, window, capacity):
    """The kind of one layer's cache.

    Args:
        kind: `"auto"`, `"static"`, `"rolling"`, a `Static` or a `Rolling`.
        window: The layer's `sliding_window`, or `None`.
        capacity: How many positions are to be taken.

    Returns:
        A `Static` or a `Rolling`.

    Raises:
        ValueError: `kind` is unknown, or `"rolling"` for a layer without a window.
    """
    if isinstance(kind, (Static, Rolling)):
        return kind
    if kind not in KINDS:
        raise ValueError(
            f"`kind` must be one of {list(KINDS)}, Static() or Rolling(window=…). "
            f"Received: {kind!r}"
        )
    if kind == Rolling.name and window is None:
        raise ValueError(
            "`kind` may be 'rolling' only where all layers have a sliding window; give "
            "Rolling(window=…) to have one. Received: kind='rolling'"
        )
    outgrows = window is not None and window < capacity
    is_rolling = kind == Rolling.name or (kind == "auto" and outgrows)
    return Rolling(window) if is_rolling else Static()
