"""What JAX makes of one decode step whose cache is donated: no copy of a cache."""

import attention_cases as cases
import keras
import pytest
from program_cases import COPIES, count_attentions, made

from keras_kvcache.runtime import native

pytestmark = pytest.mark.jax_only

S, H = 1031, 37
STEPS = [(1, 1, False), (3, 1, True), (1, 3, True), (3, 3, False)]


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


@pytest.mark.parametrize(
    "groups, batch_size, per_row, exported",
    [(3, 1, True, False), (1, 3, True, False), (3, 3, False, True)],
)
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
    assert temporaries > 0.4 * cache.nbytes
    assert made(program, COPIES, cache.size // 2)


@pytest.mark.parametrize("operation", COPIES)
def test_each_way_of_copying_is_found(operation):
    """So that no program lacks one because XLA writes it otherwise."""
    import jax
    from jax import numpy as jnp

    copy = {
        "copy": lambda x: (x, x + 1),  # the one is an argument, which stays
        "transpose": lambda x: x.swapaxes(0, 2),
        "concatenate": lambda x: jnp.concatenate([x, x + 1]),
        "broadcast": lambda x: jnp.broadcast_to(x[0], x.shape),
        "slice": lambda x: x[:, 1:],
        "gather": lambda x: x[jnp.arange(3)[::-1] * 2 % 3, :, jnp.arange(H)[:, None]],
        "convert": lambda x: x.astype("bfloat16"),
    }[operation]
    x = cases.noise(3, S, H)
    program = jax.jit(copy).lower(x).compile()
    assert made(program, (operation,), (S - 1) * 3 * H)
    assert not made(program, (operation,), 4 * x.size)


def count_traces(layers, updates=True, known_index=None):
    """How many attentions a program of several layers has."""
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
    return count_attentions(jax.jit(model).lower(*arguments))


def test_each_kind_of_attention_is_traced_once():
    """A program has each once, however many layers are alike."""
    layer = cases.make_layer
    same = [layer() for _ in range(3)]
    one = count_traces(same[:1])
    assert one > 0 and count_traces(same) == one
    for options in ({"logit_soft_cap": 7.0}, {"sliding_window": 7}, {"query_scale": 2}):
        other = layer(**options)
        assert count_traces([*same, other]) == one + count_traces([other])
    assert count_traces(same, updates=False) == count_traces(same[:1], updates=False)
    # Weights of scores are data; a function may hold weights that JAX can't tell apart.
    biased = [layer(score_bias=3, use_sink_logits=True) for _ in range(3)]
    assert count_traces(biased) == count_traces(biased[:1])
    sloped = [layer(score_bias=abs_distance)]
    assert count_traces([*same, *sloped]) == one + count_traces(sloped)


def abs_distance(query, slot):
    return -keras.ops.cast(keras.ops.abs(query - slot), "float32")


def test_a_known_index_stays_known():
    """Each layer has its own attention then, which leaves out what isn't filled."""
    layers = [cases.make_layer() for _ in range(3)]
    one = count_traces(layers[:1], known_index=5)
    assert one > 0 and count_traces(layers, known_index=5) == 3 * one


def test_attention_that_is_distributed_is_traced_in_each_layer():
    """How it lies on devices is nothing that JAX would tell traces apart by."""
    import jax

    layers = [cases.make_layer() for _ in range(2)]
    assert count_traces(layers) == count_traces(layers[:1])
    with keras.distribution.DataParallel(devices=jax.devices()).scope():
        one = count_traces(layers[:1])
        assert one > 0 and count_traces(layers) == 2 * one
