"""Functions of caches that `jax.export` serializes, called in another process."""

import pickle
import subprocess
import sys

import attention_cases as cases
import jax
import numpy as np
import pytest

from keras_kvcache.caches import CacheSpec, Rolling, Static

pytestmark = pytest.mark.jax_only

PROGRAM = """
import pickle, sys
from pathlib import Path
import jax
import numpy as np
import keras_kvcache.caches  # which registers them

for folder in map(Path, sys.argv[1:]):
    exported = jax.export.deserialize(bytearray((folder / "program").read_bytes()))
    cache, *entries = pickle.loads((folder / "arguments").read_bytes())
    cache = jax.tree_util.tree_map(jax.numpy.asarray, cache)
    updated, keys = exported.call(cache, *entries)
    assert type(updated) is type(cache)
    results = jax.tree_util.tree_map(np.asarray, (updated, keys))
    (folder / "results").write_bytes(pickle.dumps(results))
"""


def program(cache, key, value, index):
    cache, _ = cache.update(key, value, index)
    return cache, cache.to_dense() if hasattr(cache, "to_dense") else key


COMBINATIONS = [
    (kind, *pair)
    for kind in (Static(), Rolling(13, 3))
    for pair in cases.stored(["float32", "bfloat16", "int8", "int4"])
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """By combination, what its program gives here, and what in another process.

    One process calls all, as starting it takes longer than anything else here.
    """
    folders, expected = {}, {}
    entries = np.random.default_rng(7).normal(size=(2, 2, 5, 3, 10)).astype("float32")
    for kind, codec, layout in COMBINATIONS:
        spec = CacheSpec(2, 61, 3, 10, codec=codec, layout=layout, kind=kind)
        arguments = (spec.allocate(), *entries, np.int32(0))
        exported = jax.export.export(jax.jit(program))(*arguments)
        folder = tmp_path_factory.mktemp("exported")
        (folder / "program").write_bytes(exported.serialize())
        expected[kind, codec, layout] = jax.jit(program)(*arguments)
        arrays = jax.tree_util.tree_map(np.asarray, arguments)
        (folder / "arguments").write_bytes(pickle.dumps(arrays))
        folders[kind, codec, layout] = folder
    command = [sys.executable, "-c", PROGRAM, *map(str, folders.values())]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return {
        combination: (
            expected[combination],
            pickle.loads((folder / "results").read_bytes()),
        )
        for combination, folder in folders.items()
    }


@pytest.mark.parametrize("combination", COMBINATIONS, ids=str)
def test_an_exported_function_of_a_cache(combination, results):
    expected, elsewhere = results[combination]
    form = jax.tree_util.tree_structure
    assert form(elsewhere) == form(expected)
    for one, other in zip(
        *map(jax.tree_util.tree_leaves, (elsewhere, expected)), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
