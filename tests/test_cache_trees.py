"""Caches on their way through JAX, Keras and devices.

To JAX a cache is a node of a tree, to `keras.tree` a leaf. Keras has no public way to
make it a node, and as one it would be damaged: a layer casts what arrays it finds in
its arguments, so that under mixed precision the float32 scales of an `int8` cache would
become bfloat16 in any layer that hands it on. As a leaf it passes as it is.
"""

import functools
import os
import subprocess
import sys

import attention_cases as cases
import jax
import keras
import numpy as np
import pytest
from keras import ops

from keras_kvcache.caches import (
    CODECS,
    CacheSpec,
    Rolling,
    Static,
    load_caches,
    save_caches,
)
from keras_kvcache.layers import DecoderBlock

B, K, H, S = 3, 2, 7, 37
KINDS = {"static": Static(), "sinks": Rolling(13, sinks=3)}


def make_cache(**options):
    """A cache with small numbers in it, which any dtype can hold."""
    empty = CacheSpec(B, S, K, H, **options).allocate()

    def fill(array):
        numbers = np.resize(np.arange(5), array.shape)
        return ops.cast(numbers, array.dtype)

    return jax.tree_util.tree_map(fill, empty)


@pytest.fixture(scope="module")
def caches():
    """A tree of every kind, codec and layout."""
    return tuple(
        {"one": make_cache(codec=codec, layout=layout, kind=kind)}
        for codec, layout in cases.stored(("bfloat16", *CODECS))
        for kind in KINDS.values()
    )


def same(one, other):
    """Checks that two trees have the same form and the same bits."""
    arrays, form = jax.tree_util.tree_flatten(one)
    others, other_form = jax.tree_util.tree_flatten(other)
    assert form == other_form
    for array, like in zip(arrays, others, strict=True):
        array, like = ops.convert_to_numpy(array), ops.convert_to_numpy(like)
        assert (array.dtype, array.shape) == (like.dtype, like.shape)
        assert array.tobytes() == like.tobytes()


def test_jax_trees(caches):
    leaves, form = jax.tree_util.tree_flatten(caches)
    assert all(ops.is_tensor(leaf) for leaf in leaves)
    same(jax.tree_util.tree_unflatten(form, leaves), caches)
    host = jax.tree_util.tree_map(ops.convert_to_numpy, caches)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree_util.tree_leaves(host))
    same(jax.tree_util.tree_map(ops.convert_to_tensor, host), caches)
    names = [path for path, _ in jax.tree_util.tree_flatten_with_path(caches)[0]]
    assert len(set(names)) == len(leaves)


@pytest.mark.jax_only
@pytest.mark.parametrize("index", [5, [5, 0, 3]])
def test_jit(caches, index):
    """Program in, program out: the same classes, the same bits, the same index."""
    index = cases.int32(index)
    through, returned = jax.jit(lambda *state: state)(caches, index)
    same(through, caches)
    same(returned, index)


@pytest.mark.jax_only
def test_loops(caches):
    """A loop's state must keep its form, dtypes included, whatever is written."""
    new = ops.convert_to_tensor(cases.noise(B, 1, K, H, seed=7))

    def step(state):
        caches, index = state
        updated = [cache["one"].update(new, new, index)[0] for cache in caches]
        return tuple({"one": cache} for cache in updated), index + 1

    picked = (caches[0], caches[7])
    state = (picked, cases.int32(5))
    looped = jax.jit(functools.partial(jax.lax.fori_loop, 0, 2, lambda _, s: step(s)))
    stepped = jax.jit(step)
    same(looped(state), stepped(stepped(state)))


def test_keras_trees(caches):
    """What Keras hands on is the very cache; within it, JAX maps."""
    objects = [cache["one"] for cache in caches]
    assert all(a is b for a, b in zip(keras.tree.flatten(caches), objects, strict=True))
    assert not keras.tree.is_nested(objects[0])
    packed = keras.tree.pack_sequence_as(caches, objects)
    mapped = keras.tree.map_structure(lambda cache: cache, caches)
    for tree in (packed, mapped):
        assert all(a["one"] is b for a, b in zip(tree, objects, strict=True))
    keras.tree.assert_same_structure(caches, mapped)
    host = functools.partial(jax.tree_util.tree_map, ops.convert_to_numpy)
    same(keras.tree.map_structure(host, caches), caches)


class Outer(keras.Model):
    """A model as users write it: Keras casts the arrays in its arguments."""

    def __init__(self, block, **options):
        super().__init__(**options)
        self.block = block

    def call(self, x, cache=None, index=None):
        return self.block(
            x, self_attention_cache=cache, self_attention_cache_update_index=index
        )


@pytest.mark.parametrize("codec", ["float32", "int8"])
def test_layers_cast_no_cache(codec):
    """Not even those that cast what else they are given."""
    policy = keras.DTypePolicy("mixed_bfloat16")
    options = dict(head_dim=H, kernel_initializer="zeros", dtype=policy)
    model = Outer(DecoderBlock(2, 13, **options), dtype=policy)
    model.block.build((B, 1, 11))

    def call(x, cache):
        return model(x, cache=cache, index=5)

    x, cache = ops.convert_to_tensor(cases.noise(B, 1, 11)), make_cache(codec=codec)
    output, updated = cases.compiled(call)(x, cache)
    assert keras.backend.standardize_dtype(output.dtype) == "bfloat16"
    arrays, form = jax.tree_util.tree_flatten(updated)
    assert form == jax.tree_util.tree_structure(cache)
    for array, like in zip(arrays, jax.tree_util.tree_leaves(cache), strict=True):
        assert (array.shape, array.dtype) == (like.shape, like.dtype)


@pytest.mark.jax_only
def test_devices(caches):
    """To a device, to the host and back."""
    device = jax.devices()[0]
    index = cases.int32([5, 0, 3])
    for _ in range(2):
        moved = jax.device_put((caches, index), device)
        same(moved, (caches, index))
        host = jax.device_get(moved)
        leaves = jax.tree_util.tree_leaves(host)
        assert all(isinstance(leaf, np.ndarray) for leaf in leaves)
        same(jax.device_put(host), (caches, index))


@pytest.mark.jax_only
@pytest.mark.parametrize("run", ["eager", "compiled"])
def test_a_cache_on_the_host_goes_on(run):
    """A cache and an index that were brought to the host serve as they are."""
    layer = cases.make_layer(4, H, num_key_value_heads=K)
    cache = make_cache(codec="float32" if run == "eager" else "int8")
    x = ops.convert_to_tensor(cases.noise(B, 1, cases.D))

    def step(cache, index):
        return layer(x, x, cache=cache, cache_update_index=index)

    step = step if run == "eager" else cases.compiled(step)
    state = (cache, cases.int32([5, 3, 4]))
    same(step(*jax.device_get(state)), step(*state))


MESH = """
import sys
import jax, keras, numpy as np
from keras_kvcache.caches import CacheSpec, Rolling, load_caches, save_caches
assert len(jax.devices()) == 8
mesh = keras.distribution.DeviceMesh((2, 4), ["batch", "model"])
layout_map = keras.distribution.LayoutMap(mesh)
keras.distribution.set_distribution(
    keras.distribution.ModelParallel(layout_map=layout_map, batch_dim_name="batch")
)
options = dict(codec="int4", kind=Rolling(13, sinks=3))
caches = (
    CacheSpec(6, 37, 4, 7, **options).allocate(),
    CacheSpec(6, 37, 4, 7, kind=options["kind"], layout="dense").allocate(),
    CacheSpec(6, 37, 4, 7, layout="dense").allocate().to_dense(),
)
assert len(caches[0].storage.segments[0][0].sharding.device_set) == 8
save_caches(sys.argv[1], caches, 5)
loaded, _ = load_caches(sys.argv[1])
leaves = (jax.tree_util.tree_leaves(tree) for tree in (loaded, caches))
for array, like in zip(*leaves, strict=True):
    assert array.sharding.is_equivalent_to(like.sharding, like.ndim), like.sharding
    np.testing.assert_array_equal(array, like)
"""


@pytest.mark.jax_only
def test_many_devices(tmp_path):
    """A loaded cache lies on the devices where an allocated one would."""
    flags = "--xla_force_host_platform_device_count=8"
    result = subprocess.run(
        [sys.executable, "-c", MESH, tmp_path / "cache"],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


def test_a_tree_comes_back_from_a_file(caches, tmp_path):
    objects = [cache["one"] for cache in caches]
    save_caches(tmp_path / "cache", objects, 5)
    same(load_caches(tmp_path / "cache"), (objects, 5))
