"""Narrow floats held as bits: the same numbers, seen in the same way."""

import attention_cases as cases
import jax
import keras
import numpy as np
import pytest

from keras_kvcache.attention import Scoring, attend, token_positions, view_masks
from keras_kvcache.caches import CacheSpec, Rolling
from keras_kvcache.caches.trees import as_bits

pytestmark = pytest.mark.jax_only

B, S, K, H, HV = 3, 41, 2, 7, 5
KINDS = {"static": "static", "rolling": Rolling(13), "sinks": Rolling(13, sinks=3)}


@cases.compiled
def step(cache, query, key, value, index):
    cache, view = cache.update(key, value, index)
    masks = view_masks(view, token_positions(index, query.shape[1]), causal=True)
    return attend(query, view, masks, Scoring(1.0)), cache


def bits_of(cache):
    return [np.asarray(x).tobytes() for x in jax.tree_util.tree_leaves(cache)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_output_and_the_same_bits(kind, layout, dtype):
    value_dim = H if dtype == "bfloat16" else HV  # A dense one may be of one tensor.
    floats = CacheSpec(
        B, S, K, H, value_dim, codec=dtype, layout=layout, kind=KINDS[kind]
    ).allocate()
    held = as_bits(floats)
    dtypes = {x.dtype.name for x in jax.tree_util.tree_leaves(held.storage)}
    assert dtypes == {"int16"} and held.nbytes == floats.nbytes
    first = 0
    for length in (17, 1, 17, 1):
        query, key = cases.noise(2, B, length, K, H, seed=first)
        value = cases.noise(B, length, K, value_dim, seed=first + 1)
        index = cases.int32([first, first + 1, first])
        expected, floats = step(floats, query, key, value, index)
        output, held = step(held, query, key, value, index)
        np.testing.assert_array_equal(output, expected)
        assert bits_of(held) == bits_of(floats)
        first += length


def test_what_stays_as_it_was():
    """Wide floats, codes, positions, and what is no cache."""
    for codec in ("float32", "int8", "int4"):
        cache = CacheSpec(B, S, K, H, codec=codec).allocate()
        assert bits_of(as_bits(cache)) == bits_of(cache)
        assert as_bits(cache).codec == cache.codec
    tensor = keras.ops.ones((B, 2, S, K, H), "bfloat16")
    tree = {"tensor": tensor, "mask": None, "numbers": [np.arange(3)]}
    assert as_bits(tree)["tensor"] is tensor
    assert as_bits(tree)["numbers"][0] is tree["numbers"][0]


def test_on_an_accelerator_nothing_changes(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    cache = CacheSpec(B, S, K, H, codec="bfloat16").allocate()
    assert as_bits(cache) is cache
