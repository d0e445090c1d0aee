"""Narrow floats as whole numbers of their bits, for programs on a CPU.

XLA has no narrow floats there: to write or read a part of an array it widens all of it
and narrows it again, token by token. Whole numbers it leaves alone, so that only the
slots that are read are made floats of.
"""

from dataclasses import dataclass, replace

import jax
from keras import ops

from keras_kvcache.caches.codecs import BITS, Exact, Part
from keras_kvcache.caches.storage import Storage
from keras_kvcache.ops import is_jax_on_cpu

NARROW = ("bfloat16", "float16")


@dataclass(frozen=True)
class Bits(Exact):
    """Entries as they are, their 16 bits taken for a whole number's."""

    @property
    def name(self):
        """See `Codec.name`."""
        return f"{self.dtype} as bits"

    def key_parts(self, head_dim):
        """See `Codec.key_parts`."""
        return (Part(head_dim, 1, BITS),)

    def encode_keys(self, keys, axis, slots):
        """See `Codec.encode_keys`."""
        return tuple(
            ops.view(part, BITS) for part in super().encode_keys(keys, axis, slots)
        )

    def read_keys(self, parts, head_dim, axis, slots):
        """See `Codec.read_keys`."""
        floats = tuple(ops.view(part, self.dtype) for part in parts)
        return super().read_keys(floats, head_dim, axis, slots)

    value_parts, encode_values, read_values = key_parts, encode_keys, read_keys


def as_bits(cache):
    """The caches of a tree with what they hold as narrow floats held as bits.

    Elsewhere than under JAX on a CPU, and of tensors that are no caches, nothing is
    changed; nor is any value anywhere.

    Args:
        cache: A cache or a tree of caches.

    Returns:
        The same tree.
    """
    if not is_jax_on_cpu():
        return cache

    def convert(node):
        if not isinstance(node, Storage) or type(node.codec) is not Exact:
            return node
        if node.codec.dtype not in NARROW:
            return node
        bits = node.map(lambda array, *_: ops.view(array, BITS))
        return replace(bits, codec=Bits(node.codec.dtype))

    return jax.tree_util.tree_map(
        convert, cache, is_leaf=lambda node: isinstance(node, Storage)
    )
