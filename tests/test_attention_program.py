"""What JAX makes of one decode step whose cache is donated: no copy of a cache."""

import re

import attention_cases as cases
import keras
import numpy as np
import pytest

from keras_kvcache.runtime import native

pytestmark = pytest.mark.jax_only

S, H = 1031, 37
STEPS = [(1, 1, False), (3, 1, True), (1, 3, True), (3, 3, False)]
SHAPED = re.compile(r"= \w+\[([\d,]+)\]\S* ([\w-]+)\(")


def make_step(layer, cache, batch_size, per_row):
    """A step that decodes one token a row, and its arguments."""

    def step(x, cache, index):
        return layer(x, x, cache=cache, cache_update_index=index, use_causal_mask=True)

    x = cases.noise(batch_size, 1, cases.D)
    index = cases.int32([5] * batch_size if per_row else 5)
    return step, (x, cache, index)


def compiled_step(*case):
    """The program of `make_step`."""
    import jax

    step, arguments = make_step(*case)
    return jax.jit(step, donate_argnums=1).lower(*arguments).compile()


def exported_step(*case):
    """The program of `make_step` that others load: nothing of ours is called there."""
    import jax

    step, (x, cache, index) = make_step(*case)
    leaves, tree = jax.tree_util.tree_flatten(cache)

    @jax.jit
    def of_leaves(x, index, *leaves):
        output, cache = step(x, jax.tree_util.tree_unflatten(tree, leaves), index)
        return output, *jax.tree_util.tree_leaves(cache)

    exported = jax.export.export(of_leaves)(x, index, *leaves)
    loaded = jax.jit(exported.call, donate_argnums=range(2, 2 + len(leaves)))
    return loaded.lower(x, index, *leaves).compile()


def made(program, operations, at_least):
    """Sizes of the arrays that the operations make, from a number of elements on."""
    found = []
    for shape, operation in SHAPED.findall(program.as_text()):
        size = int(np.prod([int(axis) for axis in shape.split(",")]))
        if operation in operations and size >= at_least:
            found.append((operation, shape))
    return found


COPIES = ("copy", "transpose", "concatenate", "broadcast", "slice", "gather", "convert")


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("groups, batch_size, per_row", STEPS)
def test_head_major_cache_is_read_where_it_lies(
    groups, batch_size, per_row, kernel, request
):
    if not kernel:
        request.getfixturevalue("without_compiler")
    layer = cases.make_layer(6, H, num_key_value_heads=6 // groups)
    cache = cases.make_cache(layer, batch_size, S, "head_major")
    program = compiled_step(layer, cache, batch_size, per_row)
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes == cache.nbytes
    # Scores of the largest segment, and copies of the smallest, 7 slots, are small.
    assert memory.temp_size_in_bytes < 0.08 * cache.nbytes
    half_of_256 = batch_size * 6 // groups * 256 * H
    assert not made(program, COPIES, half_of_256)


@pytest.mark.skipif(native.find_compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("groups, batch_size, per_row", STEPS)
def test_dense_cache_is_read_where_it_lies(groups, batch_size, per_row):
    layer = cases.make_layer(6, H, num_key_value_heads=6 // groups)
    cache = cases.make_cache(layer, batch_size, S, "dense")
    program = compiled_step(layer, cache, batch_size, per_row)
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes == cache.nbytes
    assert memory.temp_size_in_bytes < 0.08 * cache.nbytes
    assert not made(program, COPIES, batch_size * 6 // groups * 64 * H)


@pytest.mark.parametrize("exported", [False, True])
@pytest.mark.parametrize("groups, batch_size, per_row", STEPS)
def test_dense_cache_is_copied_a_block_at_a_time_without_the_kernel(
    groups, batch_size, per_row, exported, request
):
    capacity, heads = 8209, 6 // groups
    layer = cases.make_layer(6, H, num_key_value_heads=heads)
    cache = cases.make_cache(layer, batch_size, capacity, "dense")
    if exported:
        program = exported_step(layer, cache, batch_size, per_row)
    else:
        request.getfixturevalue("without_compiler")
        program = compiled_step(layer, cache, batch_size, per_row)
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes == cache.nbytes
    # Keys and values of a block are 2 · 1024 of 2 · 8209 slots.
    assert memory.temp_size_in_bytes < 0.15 * cache.nbytes
    block = batch_size * 1024 * heads * H
    assert not made(program, COPIES, block + 1)
    assert made(program, COPIES, block)  # which shows that `made` finds some


def test_what_a_copy_would_look_like():
    """The way of slicing, updating and stacking is seen by the same yardstick."""
    import jax

    cache = keras.ops.zeros((1, 2, S, 3, H))

    def step(cache, entry, index):
        halves = [
            keras.ops.slice_update(cache[:, half], (0, index, 0, 0), entry)
            for half in (0, 1)
        ]
        return keras.ops.stack(halves, axis=1)

    entry = keras.ops.ones((1, 1, 3, H))
    program = jax.jit(step, donate_argnums=0).lower(cache, entry, 5).compile()
    temporaries = program.memory_analysis().temp_size_in_bytes
    assert temporaries > 0.4 * cache.nbytes or made(program, COPIES, cache.size // 2)


def count_traces(layers, updates=True, known_index=None):
    """How many attentions a program of several layers has apart from its own text."""
    import jax

    def model(x, caches, index):
        index = index if known_index is None else known_index
        returned = []
        for layer, cache in zip(layers, caches, strict=True):
            if updates:
                x, cache = layer(x, x, cache=cache, cache_update_index=index)
            else:
                x, cache = layer(x, None, cache=cache)
            returned.append(cache)
        return x, returned

    caches = [cases.make_cache(layer, 2, 31, "head_major") for layer in layers]
    arguments = (cases.noise(2, 1, cases.D), caches, cases.int32(5))
    text = jax.jit(model).lower(*arguments).as_text()
    return text.count("func.func private @_cached_attention")


def test_each_kind_of_attention_is_traced_once():
    same = [cases.make_layer() for _ in range(3)]
    assert count_traces(same) == 1
    assert count_traces([*same, cases.make_layer(logit_soft_cap=7.0)]) == 2
    assert count_traces([*same, cases.make_layer(sliding_window=7)]) == 2
    assert count_traces([*same, cases.make_layer(query_scale=0.7)]) == 2
    assert count_traces(same, updates=False) == 1
    # Weights of scores are data; a function may hold weights that JAX can't tell apart.
    biased = [cases.make_layer(score_bias=3, use_sink_logits=True) for _ in range(3)]
    assert count_traces(biased) == 1
    assert count_traces([*same, cases.make_layer(score_bias=abs_distance)]) == 1


def abs_distance(query, slot):
    return -keras.ops.cast(keras.ops.abs(query - slot), "float32")


def test_a_known_index_stays_known():
    assert count_traces([cases.make_layer()], known_index=5) == 0


def test_attention_that_is_distributed_is_traced_in_each_layer():
    """How it lies on devices is nothing that JAX would tell traces apart by."""
    import jax

    layers = [cases.make_layer() for _ in range(2)]
    assert count_traces(layers) == 1
    with keras.distribution.DataParallel(devices=jax.devices()).scope():
        assert count_traces(layers) == 0
