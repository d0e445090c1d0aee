"""Operations on the rows of caches: take, repeat, insert, reset, split and join them.

All of these are pure functions of a cache or of any tree of caches, such as the tuple
of one a layer that `init_cache` gives; a dense tensor counts as a cache. They may run
in a compiled program, under `jax.jit`, and there `insert_rows` and `reset_rows`
write in place what is donated.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import jax
import keras
from keras import ops

from keras_kvcache.attention import splice
from keras_kvcache.attention.positions import FAR
from keras_kvcache.caches.cache import Cache
from keras_kvcache.caches.static import StaticCache
from keras_kvcache.caches.trees import batch_size, distributed, map_caches
from keras_kvcache.runtime.concrete import concrete_integers, concrete_value, is_integer


def take_rows(cache: Any, rows: Any) -> Any:
    """Gathers rows, in any order and with repetitions, as beam search does.

    Args:
        cache: A cache or a tree of caches.
        rows: Integers `(B',)`: row `b` of the result is row `rows[b]`.

    Returns:
        The same tree, with `B'` rows.

    Raises:
        ValueError: A row isn't there, or `rows` isn't of one axis. Rows that are traced
            are clamped instead.
    """
    size = batch_size(cache)
    rows = ops.clip(_check_rows(rows, size), 0, size - 1)
    return _map(lambda array: ops.take(array, rows, axis=0), cache)


def repeat_rows(cache: Any, repeats: int) -> Any:
    """Repeats each row; the copies of a row follow each other.

    Args:
        cache: A cache or a tree of caches.
        repeats: A positive integer.

    Returns:
        The same tree, with `B · repeats` rows.

    Raises:
        ValueError: `repeats` isn't a positive integer.
    """
    if not is_integer(repeats) or repeats < 1:
        raise ValueError(f"`repeats` must be a positive integer. Received: {repeats!r}")
    return _map(lambda array: ops.repeat(array, repeats, axis=0), cache)


def insert_rows(cache: Any, other: Any, row: Any) -> Any:
    """Replaces rows of a cache by those of another one.

    Args:
        cache: A cache or a tree of caches, of `B` rows.
        other: The same kind, codec, layout and number of slots, of `B'` rows.
        row: Where the first of them goes: an int or an integer tensor `()`.

    Returns:
        The tree of `cache`, with rows `row … row + B' - 1` replaced.

    Raises:
        ValueError: The two differ in more than rows, `row` isn't one integer, or the
            rows don't fit. If `row` is traced, rows that don't fit are dropped.
    """
    _check_alike("other", other, cache)
    known = concrete_integers("row", row)
    rows, given = batch_size(cache), batch_size(other)
    if given > rows or (known is not None and not 0 <= known <= rows - given):
        raise ValueError(
            "`other` must fit into the rows of `cache` from `row` on. Received: "
            f"row={row if known is None else int(known)}, {given} rows for {rows}"
        )
    row = row if known is None else int(known)
    return _map(lambda a, b: splice(a, b, row, axis=0), cache, other)


def reset_rows(cache: Any, rows: Any) -> Any:
    """Empties rows.

    Args:
        cache: A cache or a tree of caches.
        rows: Integers `(any,)`.

    Returns:
        The same tree, with zeros in these rows.

    Raises:
        ValueError: A row isn't there, or `rows` isn't of one axis.
    """
    size = batch_size(cache)
    rows = _check_rows(rows, size)
    is_reset = ops.any(rows[:, None] == ops.arange(size, dtype=rows.dtype), axis=0)

    def fill(array, value):
        shape = [-1] + [1] * (len(array.shape) - 1)
        empty = ops.cast(value, array.dtype)
        return ops.where(ops.reshape(is_reset, shape), empty, array)

    def reset(cache):
        emptied = _map(lambda array: fill(array, 0), cache)
        if isinstance(cache, Cache) and cache.end is not None:
            return replace(emptied, end=fill(cache.end, FAR))
        return emptied

    return map_caches(reset, cache)


def split_rows(cache: Any, sizes: Sequence[int]) -> list[Any]:
    """Cuts a batch into several.

    Args:
        cache: A cache or a tree of caches.
        sizes: Rows of each part; they add up to `B`.

    Returns:
        A list of such trees.

    Raises:
        ValueError: The sizes aren't positive integers or don't add up.
    """
    rows = batch_size(cache)
    is_list = isinstance(sizes, (list, tuple))
    is_right = is_list and all(is_integer(size) and size > 0 for size in sizes)
    if not is_right or sum(sizes) != rows:
        raise ValueError(
            "`sizes` must be a list of positive integers that add up to the "
            f"{rows} rows. Received: {sizes!r}"
        )
    parts, first = [], 0
    for size in sizes:
        span = slice(first, first + size)
        parts.append(_map(lambda array, span=span: array[span], cache))
        first += size
    return parts


def join_rows(caches: Iterable[Any]) -> Any:
    """Concatenates batches.

    Args:
        caches: Caches or trees of caches that differ in their rows only.

    Returns:
        Such a tree with all rows, in the order given.

    Raises:
        ValueError: There is none, or they differ in more than rows.
    """
    caches = list(caches)
    if not caches:
        raise ValueError("`caches` must hold at least one cache. Received: []")
    for other in caches[1:]:
        _check_alike("caches", other, caches[0])
    return _map(lambda *arrays: ops.concatenate(arrays, axis=0), *caches)


def _map(function, cache, *others):
    """A tree of arrays that `function` makes, laid out over devices as caches are."""
    return distributed(jax.tree_util.tree_map(function, cache, *others))


def _check_rows(rows, size):
    rows = ops.convert_to_tensor(rows)
    dtype = keras.backend.standardize_dtype(rows.dtype)
    known = concrete_value(rows)
    is_there = known is None or ((known >= 0) & (known < size)).all()
    if len(rows.shape) != 1 or 0 in rows.shape or "int" not in dtype or not is_there:
        received = f"a tensor {tuple(rows.shape)}" if known is None else known.tolist()
        raise ValueError(
            f"`rows` must be a list of rows from 0 to {size - 1}. Received: {received}"
        )
    return rows


def _check_alike(name, other, cache):
    """Refuses a tree that differs in more than rows."""
    sizes = [_capacities(tree) for tree in (other, cache)]
    differing = [pair for pair in zip(*sizes, strict=False) if pair[0] != pair[1]]
    if differing:
        raise ValueError(
            f"`{name}` must have caches of the same capacity: call "
            "`keras_kvcache.caches.resize`, or a generator's `resize` for its rows, "
            "before. Received: "
            f"{differing[0][0]} slots for {differing[0][1]}"
        )
    pair = [jax.tree_util.tree_flatten_with_path(tree) for tree in (other, cache)]
    (leaves, structure), (expected, wanted) = pair
    if structure != wanted:
        raise ValueError(
            f"`{name}` must be caches of the same kind, codec, layout and capacity. "
            f"Received: {other!r} for {cache!r}"
        )
    for (path, array), (_, like) in zip(leaves, expected, strict=True):
        if array.shape[1:] != like.shape[1:] or array.dtype != like.dtype:
            place = jax.tree_util.keystr(path) or "an array"
            raise ValueError(
                f"`{name}` must differ in rows only. Received: {place} of shape "
                f"{tuple(array.shape)} and dtype {array.dtype}, for "
                f"{tuple(like.shape)} and {like.dtype}"
            )


def _capacities(tree):
    """Slots of each static cache of a tree; those of others are no capacity."""
    nodes = jax.tree_util.tree_leaves(
        tree, is_leaf=lambda node: isinstance(node, Cache)
    )
    return [node.capacity for node in nodes if isinstance(node, StaticCache)]
