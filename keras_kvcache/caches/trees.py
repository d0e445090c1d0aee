"""Trees of caches, cache by cache, and how they lie over devices."""

import jax

from keras_kvcache.caches.cache import Cache
from keras_kvcache.caches.dense import DenseStorage
from keras_kvcache.runtime.sharding import distribute


def map_caches(function, tree):
    """Applies a function to each cache of a tree; a dense tensor counts as one."""
    return jax.tree_util.tree_map(
        function, tree, is_leaf=lambda node: isinstance(node, Cache)
    )


def batch_size(tree):
    """`B` of a tree of caches.

    Raises:
        ValueError: There is none in it.
    """
    arrays = jax.tree_util.tree_leaves(tree)
    if not arrays:
        raise ValueError(f"`cache` must hold at least one cache. Received: {tree!r}")
    return arrays[0].shape[0]


def distributed(tree):
    """A tree of caches laid out over devices as `keras.distribution` has it.

    By rows and by key/value heads, each where it divides.
    """

    def one(cache):
        is_cache = isinstance(cache, Cache)
        storage = cache.storage if is_cache else DenseStorage

        def lay_out(array):
            # What else there may be a row has no heads.
            has_heads = len(array.shape) > 1 if is_cache else len(array.shape) == 5
            return distribute(array, storage.heads_axis if has_heads else None)

        return jax.tree_util.tree_map(lay_out, cache)

    return map_caches(one, tree)
