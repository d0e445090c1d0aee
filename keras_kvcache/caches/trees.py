"""Trees of caches, cache by cache: their layout over devices, narrow floats as bits."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
from keras import ops

from keras_kvcache.attention.codecs import BITS, Bits, Exact
from keras_kvcache.attention.segments import DENSE
from keras_kvcache.caches.cache import Cache
from keras_kvcache.caches.static import StaticCache
from keras_kvcache.caches.storage import Storage
from keras_kvcache.runtime.platform import current_platform
from keras_kvcache.runtime.sharding import distribute


def map_caches(function: Callable[[Any], Any], tree: Any) -> Any:
    """Applies a function to each cache of a tree; a dense tensor counts as one."""
    return jax.tree_util.tree_map(
        function, tree, is_leaf=lambda node: isinstance(node, Cache)
    )


def as_cache(cache: Any) -> Cache:
    """A cache as it is, a dense tensor `(B, 2, S, K, H)` as the cache that it holds.

    Raises:
        TypeError: It is neither.
        ValueError: The tensor has another rank, or no keys or no values.
    """
    if isinstance(cache, Cache):
        return cache
    if hasattr(cache, "shape"):
        return StaticCache.from_dense(cache, "dense")
    raise TypeError(
        "`cache` must be a tensor of shape (B, 2, S, K, H) or a cache object of "
        f"`keras_kvcache.caches`. Received: {type(cache).__name__}"
    )


def batch_size(tree: Any) -> int:
    """`B` of a tree of caches.

    Raises:
        ValueError: There is none in it.
    """
    arrays = jax.tree_util.tree_leaves(tree)
    if not arrays:
        raise ValueError(f"`cache` must hold at least one cache. Received: {tree!r}")
    return arrays[0].shape[0]


def distributed(tree: Any) -> Any:
    """A tree of caches laid out over devices as `keras.distribution` has it.

    By rows and by key/value heads, each where it divides.
    """

    def one(cache):
        is_cache = isinstance(cache, Cache)
        layout = cache.storage.layout if is_cache else DENSE

        def lay_out(array):
            # What else there may be a row has no heads.
            has_heads = len(array.shape) > 1 if is_cache else len(array.shape) == 5
            return distribute(array, layout.heads if has_heads else None)

        return jax.tree_util.tree_map(lay_out, cache)

    return map_caches(one, tree)


NARROW = ("bfloat16", "float16")


def as_bits(cache: Any) -> Any:
    """Recodes narrow floats as `Bits`, as `CacheSpec.allocate` has them.

    No value changes. Dense tensors stay as they are, and so does everything elsewhere
    than under JAX on a CPU.

    Args:
        cache: A cache or a tree of caches.

    Returns:
        The same tree.
    """
    if not current_platform().stores_bits:
        return cache

    def convert(node):
        if not isinstance(node, Storage) or type(node.codec) is not Exact:
            return node
        if node.codec.dtype not in NARROW:
            return node
        bits = node.map(lambda array, *_: ops.view(array, BITS))
        return replace(bits, codec=Bits(node.codec.dtype))

    return _map_storages(convert, cache)


def as_floats(cache: Any) -> Any:
    """The inverse of `as_bits`: caches as they are on other platforms.

    Args:
        cache: A cache or a tree of caches.

    Returns:
        The same tree.
    """

    def convert(node):
        if not isinstance(node, Storage) or type(node.codec) is not Bits:
            return node
        dtype = node.codec.dtype
        floats = node.map(lambda array, *_: ops.view(array, dtype))
        return replace(floats, codec=Exact(dtype))

    return _map_storages(convert, cache)


def _map_storages(function, tree):
    return jax.tree_util.tree_map(
        function, tree, is_leaf=lambda node: isinstance(node, Storage)
    )
