"""Decodes on eight virtual devices; run by `test_sharding.py` in a process of its own.

Prints a line of JSON: the tokens, and the largest array that a compiled decode loop
brings together from several devices, by case.
"""

import json
import math
import os
import re
import sys

os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)
os.environ["KERAS_BACKEND"] = "jax"

import jax
import keras
import numpy as np

from keras_kvcache import DecoderLM
from keras_kvcache.caches import (
    Rolling,
    insert_rows,
    repeat_rows,
    reset_rows,
    split_rows,
    take_rows,
)

KEY_VALUE_HEADS, HEAD_DIM, CAPACITY = 4, 8, 512
ROWS = (8, 3)  # Of these, one number can be spread.
COLLECTIVES = (
    "all-gather|all-reduce|all-to-all|collective-permute|collective-broadcast"
    "|reduce-scatter"
)
CACHES = {
    "head_major": {},
    "dense": {"layout": "dense"},
    "int8": {"codec": "int8"},
    "int4": {"codec": "int4"},
    "rolling": {"kind": Rolling(CAPACITY, sinks=3)},
}


def distribution(name):
    """One of Keras' distributions, over all devices."""
    devices = keras.distribution.list_devices()
    assert len(devices) == 8
    if name == "data":
        return keras.distribution.DataParallel(devices=devices)
    # Four parts divide the key/value heads, eight don't.
    shape = {"model": (2, 4), "undivided": (1, 8)}[name]
    mesh = keras.distribution.DeviceMesh(shape, ["batch", "model"], devices)
    layout = keras.distribution.LayoutMap(mesh)
    layout[".*token_embedding.*"] = ("model", None)
    layout[".*query.*kernel"] = (None, "model", None)
    layout[".*attention_output.*kernel"] = ("model", None, None)
    layout[".*(gate|intermediate).*kernel"] = (None, "model")
    layout[".*feedforward.*output.*kernel"] = ("model", None)
    if name == "model":
        layout[".*(key|value).*kernel"] = (None, "model", None)
    return keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="batch")


def make_model():
    keras.utils.set_random_seed(1)
    return DecoderLM(
        vocabulary_size=40,
        num_layers=1,
        num_query_heads=8,
        num_key_value_heads=KEY_VALUE_HEADS,
        hidden_dim=8 * HEAD_DIM,
        intermediate_dim=128,
        max_sequence_length=CAPACITY,
        kernel_initializer=keras.initializers.RandomNormal(stddev=0.4),
    )


def decode_program(lm, rows, cache):
    """The compiled decode loop, and the layouts its caches come in."""
    caches = lm.init_cache(rows, CAPACITY, **cache)
    return lm.generator.lower(caches).compile(), caches


def largest_gathered(program):
    """Elements of the largest array that devices bring together."""
    results = re.findall(rf"= (.*?) (?:{COLLECTIVES})(?:-start)?\(", program.as_text())
    shapes = re.findall(r"\w+\[([\d,]+)\]", " ".join(results))
    return max((math.prod(map(int, shape.split(","))) for shape in shapes), default=0)


def smallest_shard(caches):
    """Numbers that a device has of a segment's keys, where it has fewest."""
    keys = [arrays[0] for cache in caches for arrays in cache.storage.segments]
    return min(math.prod(array.sharding.shard_shape(array.shape)) for array in keys)


def gathered_on_purpose(caches):
    """What is seen in a program that does bring keys together."""
    array = caches[0].storage.segments[0][0]
    everywhere = jax.sharding.NamedSharding(
        array.sharding.mesh, jax.sharding.PartitionSpec()
    )
    gather = jax.jit(lambda array: array, out_shardings=everywhere)
    return largest_gathered(gather.lower(array).compile())


def keeps_layout(program, caches):
    """Whether each array of the caches goes out laid out as it came in."""
    return is_laid_out_as(caches, program.output_shardings[0].cache)


def verbs_keep_layout(caches, rows):
    """Whether rows that change places stay laid out as rows are, compiled or not."""

    def change(caches):
        turned = take_rows(caches, list(range(rows))[::-1])
        emptied = reset_rows(turned, [1])
        twice = split_rows(repeat_rows(emptied, 2), [rows, rows])
        return insert_rows(twice[0], twice[1], 0)

    changed = (change(caches), jax.jit(change)(caches))
    return all(
        is_laid_out_as(caches, jax.tree_util.tree_map(lambda x: x.sharding, tree))
        for tree in changed
    )


def is_laid_out_as(caches, shardings):
    came = jax.tree_util.tree_leaves(caches)
    went = jax.tree_util.tree_leaves(shardings)
    return all(
        sharding.is_equivalent_to(array.sharding, array.ndim)
        for array, sharding in zip(came, went, strict=True)
    )


def main(name):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 40, 5 + row).tolist() for row in range(ROWS[0])]
    single = make_model()
    weights = single.get_weights()
    seen = {}
    expected = {
        case: single.generate(prompts, max_new_tokens=20, cache=cache)
        for case, cache in CACHES.items()
    }
    keras.distribution.set_distribution(distribution(name))
    lm = make_model()
    lm.set_weights(weights)
    for case, cache in CACHES.items():
        tokens = lm.generate(prompts, max_new_tokens=20, cache=cache)
        seen[case] = {"equal": tokens == expected[case]}
        for rows in ROWS:
            program, caches = decode_program(lm, rows, cache)
            array = jax.tree_util.tree_leaves(caches[0].storage)[0]
            seen[case][rows] = {
                "spread": math.prod(array.shape)
                // math.prod(array.sharding.shard_shape(array.shape)),
                "gathered": largest_gathered(program),
                "shard": smallest_shard(caches),
                "gathered on purpose": gathered_on_purpose(caches),
                "keeps_layout": keeps_layout(program, caches),
                "verbs_keep_layout": verbs_keep_layout(caches, rows),
            }
    print(json.dumps(seen))


if __name__ == "__main__":
    main(sys.argv[1])
