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
import jax
import numpy as np
import keras_kvcache.caches  # which registers them

program, arguments, results = sys.argv[1:]
with open(program, "rb") as file:
    exported = jax.export.deserialize(bytearray(file.read()))
with open(arguments, "rb") as file:
    cache, *entries = pickle.load(file)
cache = jax.tree_util.tree_map(jax.numpy.asarray, cache)
updated, keys = exported.call(cache, *entries)
assert type(updated) is type(cache)
with open(results, "wb") as file:
    pickle.dump(jax.tree_util.tree_map(np.asarray, (updated, keys)), file)
"""


def program(cache, key, value, index):
    cache, _ = cache.update(key, value, index)
    return cache, cache.to_dense() if hasattr(cache, "to_dense") else key


@pytest.mark.parametrize(
    "codec, layout", cases.stored(["float32", "bfloat16", "int8", "int4"])
)
@pytest.mark.parametrize("kind", [Static(), Rolling(13, 3)])
def test_an_exported_function_of_a_cache(kind, codec, layout, tmp_path):
    spec = CacheSpec(2, 61, 3, 10, codec=codec, layout=layout, kind=kind)
    cache = spec.allocate()
    random = np.random.default_rng(7)
    entries = random.normal(size=(2, 2, 5, 3, 10)).astype("float32")
    arguments = (cache, *entries, np.int32(0))
    exported = jax.export.export(jax.jit(program))(*arguments)
    (tmp_path / "program").write_bytes(exported.serialize())
    expected = jax.jit(program)(*arguments)
    with open(tmp_path / "arguments", "wb") as file:
        pickle.dump(jax.tree_util.tree_map(np.asarray, arguments), file)
    names = [str(tmp_path / name) for name in ("program", "arguments", "results")]
    command = [sys.executable, "-c", PROGRAM, *names]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    with open(names[2], "rb") as file:
        results = pickle.load(file)
    form = jax.tree_util.tree_structure
    assert form(results) == form(expected)
    for one, other in zip(
        *map(jax.tree_util.tree_leaves, (results, expected)), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
