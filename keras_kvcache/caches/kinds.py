"""Kinds of caches, and the `cache` argument of `generate`: kind, codec and layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from keras_kvcache.attention.codecs import Codec
from keras_kvcache.known_names import CODED, FLOATS, KINDS
from keras_kvcache.runtime.concrete import is_integer


@dataclass(frozen=True)
class Static:
    """Each position has its slot: see `StaticCache`."""

    name = "static"


@dataclass(frozen=True)
class Rolling:
    """The last positions only: see `RollingCache`.

    Attributes:
        window: `W`, how many positions a query sees, its own included.
        sinks: How many of the first positions are kept and seen besides.

    Raises:
        ValueError: `window` isn't a positive integer, or `sinks` isn't an integer
            from 0 to below it.
    """

    window: int
    sinks: int = 0

    name = "rolling"

    def __post_init__(self):
        for name, least in (("window", 1), ("sinks", 0)):
            value = getattr(self, name)
            if not is_integer(value) or value < least:
                raise ValueError(
                    f"`{name}` must be an integer of at least {least}. Received: "
                    f"{value!r}"
                )
        if self.sinks >= self.window:
            raise ValueError(
                "`sinks` must be smaller than `window`. Received: "
                f"sinks={self.sinks}, window={self.window}"
            )


CACHE_OPTIONS = ("kind", "codec", "layout")


def read_options(
    cache: str | Codec | Static | Rolling | dict[str, Any] | None,
) -> dict[str, Any]:
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
        unknown = sorted(set(cache) - set(CACHE_OPTIONS))
        if unknown:
            raise ValueError(
                f"`cache` may have the keys {list(CACHE_OPTIONS)}. Received: {unknown}"
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


def choose_kind(
    kind: str | Static | Rolling, window: int | None, capacity: int
) -> Static | Rolling:
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
