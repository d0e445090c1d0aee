"""Narrow floats as whole numbers of their bits, for programs on a CPU."""

from dataclasses import replace

import jax
from keras import ops

from keras_kvcache.attention.codecs import BITS, Bits, Exact
from keras_kvcache.caches.storage import Storage
from keras_kvcache.runtime.platform import current_platform

NARROW = ("bfloat16", "float16")


def as_bits(cache):
    """The caches of a tree with what they hold as narrow floats held as `Bits`.

    So are caches that `CacheSpec.allocate` makes. Elsewhere than under JAX on a CPU,
    and of tensors that are no caches, nothing is changed; nor is any value anywhere.

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


def as_floats(cache):
    """The caches of a tree as they are elsewhere: what is held as bits as floats.

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
