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

# Dtypes that XLA's CPU backend lacks.
NARROW = ("bfloat16", "float16")


def map_caches(function: Callable[[Any], Any], tree: Any) -> Any:
    """Applies a function to each cache of a tree; a dense tensor counts as one."""
    return jax.tree_util.tree_map(
        function, tree, is_leaf=lambda node: isinstance(node, Cache)
    )


def as_cache(cache: Any) -> Cache:
    """Returns a cache as it is, a dense tensor `(B, 2, S, K, H)` as a `StaticCache`.

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
        ValueError: The tree holds no cache.
    """
    arrays = jax.tree_util.tree_leaves(tree)
    if not arrays:
        raise ValueError(f"`cache` must hold at least one cache. Received: {tree!r}")
    return arrays[0].shape[0]


def distributed(tree: Any) -> Any:
    """A tree of caches laid out over devices as `keras.distribution` has it.

    Rows and key/value heads are split where their number divides.
    """

    def one(cache):
        is_cache = isinstance(cache, Cache)
        layout = cache.storage.layout if is_cache else DENSE

        def lay_out(array):
            # Other arrays, such as `end`, have no axis of heads.
            has_heads = len(array.shape) > 1 if is_cache else len(array.shape) == 5
            return distribute(array, layout.heads if has_heads else None)

        return jax.tree_util.tree_map(lay_out, cache)

    return map_caches(one, tree)


def as_bits(cache: Any) -> Any:
    """Recodes narrow floats as `Bits`, as `CacheSpec.allocate` has them.

    No value changes. Dense tensors stay as they are, and so does everything elsewhere
    than under JAX on a CPU.

    Args:
        cache: A cache or a tree of caches.

    Returns:
        The same tree.
    """
    return _recode(cache, Exact, Bits) if current_platform().stores_bits else cache


def as_floats(cache: Any) -> Any:
    """The inverse of `as_bits`: caches as they are on other platforms.

    Args:
        cache: A cache or a tree of caches.

    Returns:
        The same tree.
    """
    return _recode(cache, Bits, Exact)


def _recode(tree, old, new):
    """Bit-casts storages of narrow floats from one codec to the other."""

    def convert(node):
        is_storage = isinstance(node, Storage) and type(node.codec) is old
        if not is_storage or node.codec.dtype not in NARROW:
            return node
        dtype = BITS if new is Bits else node.codec.dtype
        views = node.map(lambda array, *_: ops.view(array, dtype))
        return replace(views, codec=new(node.codec.dtype))

    return jax.tree_util.tree_map(
        convert, tree, is_leaf=lambda node: isinstance(node, Storage)
    )
