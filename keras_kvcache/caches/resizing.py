"""Operations on the slots of caches: go back, grow, shrink, end.

All of these are pure functions of a cache or of any tree of caches, such as the tuple
of one a layer that `init_cache` gives; a dense tensor counts as a cache. They may run
in a compiled program, under `jax.jit`.
"""

from typing import Any

from keras import ops

from keras_kvcache.caches.cache import Cache
from keras_kvcache.caches.rolling import RollingCache
from keras_kvcache.caches.trees import as_cache, batch_size, distributed, map_caches
from keras_kvcache.runtime.concrete import concrete_integers, is_integer


def crop(cache: Any, fill: Any, length: Any) -> Any:
    """Checks that a cache can be rolled back to fewer positions.

    No entry is moved or erased: it's the next call that rolls back, by an index of at
    most `length`. This refuses a length whose entries are partly overwritten.

    Args:
        cache: A cache or a tree of caches.
        fill: The most positions that were ever written, even if the cache went
            back since: an int, or integers `(B,)`.
        length: How many to keep, likewise.

    Returns:
        The cache.

    Raises:
        ValueError: One isn't an integer or one a row, `length` is negative or past
            the fill, the fill past the capacity, or what is to be seen again is
            overwritten in a rolling cache. Values that are traced can't be checked.
    """
    rows = batch_size(cache)
    fill_value = concrete_integers("fill", fill, rows)
    length_value = concrete_integers("length", length, rows)
    if fill_value is None or length_value is None:
        return cache
    if (length_value < 0).any() or (length_value > fill_value).any():
        raise ValueError(
            "`length` must be from 0 to the fill. Received: "
            f"length={length_value.tolist()}, fill={fill_value.tolist()}"
        )

    def check(cache):
        as_cache(cache).check_crop(fill_value, length_value)
        return cache

    return map_caches(check, cache)


def resize(cache: Any, capacity: int, fill: Any) -> Any:
    """Gives static caches more or fewer slots.

    Rolling caches stay as they are, as their slots don't depend on the length of the
    text; `resize_window` is for them. So it can be called with all caches of a model
    of which only some layers have a sliding window.

    Args:
        cache: A cache or a tree of caches.
        capacity: The new number of slots `S`.
        fill: How many positions are written: an int, or integers `(B,)`.

    Returns:
        The same tree with the same entries.

    Raises:
        ValueError: `capacity` isn't a positive integer or less than the fill, or
            `fill` isn't an integer or one a row. One that is traced can't be
            compared with the capacity.
    """
    if not is_integer(capacity) or capacity < 1:
        raise ValueError(
            f"`capacity` must be a positive integer. Received: {capacity!r}"
        )
    concrete_integers("fill", fill, batch_size(cache))

    def one(cache):
        if isinstance(cache, RollingCache):
            return cache
        resized = as_cache(cache).resize(capacity, fill)
        return distributed(resized if isinstance(cache, Cache) else resized.to_dense())

    return map_caches(one, cache)


def resize_window(cache: Any, window: int, fill: Any) -> Any:
    """Gives rolling caches another window; all others stay as they are.

    Args:
        cache: A cache or a tree of caches.
        window: The new `W`.
        fill: How many positions are written: an int, or integers `(B,)`.

    Returns:
        The same tree with the same entries, as far as the window reaches.

    Raises:
        ValueError: `window` isn't an integer above the number of sinks, it is to
            grow in a cache that has overwritten something, or `fill` isn't an
            integer or one a row. One that is traced can't be checked further.
    """
    concrete_integers("fill", fill, batch_size(cache))

    def one(cache):
        if isinstance(cache, RollingCache):
            return cache.resize_window(window, fill)
        return cache

    return map_caches(one, cache)


def with_end(cache: Any, end: Any) -> Any:
    """Lets rows drop entries at or past a position; see `Cache.with_end`.

    Args:
        cache: A cache or a tree of caches.
        end: int32 `(B,)`, or `None` for no end.

    Returns:
        The cache.
    """

    end = end if end is None else ops.convert_to_tensor(end)

    def one(cache):
        return cache.with_end(end) if isinstance(cache, Cache) else cache

    return map_caches(one, cache)
