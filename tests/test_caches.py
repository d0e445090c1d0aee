"""Caches: layouts, sizes, immutability, and what JAX makes of them."""

import dataclasses

import attention_cases as cases
import keras
import numpy as np
import pytest

from keras_kvcache.caches import Cache, CacheSpec, DenseCache, StaticCache
from keras_kvcache.caches.static import segment_sizes

B, K, H = 3, 2, 7
CAPACITIES = (1, 256, 257, 521)


@pytest.mark.parametrize(
    "capacity, sizes",
    [
        (1, (1,)),
        (256, (256,)),
        (257, (256, 1)),
        (521, (256, 256, 9)),
        (2048, (256, 256, 512, 1024)),
        (2053, (256, 256, 512, 1024, 5)),
    ],
)
def test_segments(capacity, sizes):
    assert segment_sizes(capacity) == sizes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("capacity", CAPACITIES)
def test_layouts_turn_into_each_other(capacity, dtype):
    """Not a bit is lost either way, and each entry is where it belongs."""
    tensor = keras.ops.convert_to_tensor(cases.noise(B, 2, capacity, K, H), dtype=dtype)
    static = DenseCache(tensor).to_static()
    assert [keys.shape[3] for keys in static.keys] == list(segment_sizes(capacity))
    np.testing.assert_array_equal(cases.entries(static), cases.numpy(tensor))
    back = static.to_dense()
    assert keras.backend.standardize_dtype(back.dtype) == dtype
    np.testing.assert_array_equal(cases.numpy(back), cases.numpy(tensor))


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_size_is_what_is_allocated(layout, dtype):
    spec = CacheSpec(B, 521, K, H, dtype=dtype, layout=layout)
    cache = spec.allocate()
    arrays = [cache.tensor] if layout == "dense" else cache.keys + cache.values
    allocated = sum(np.asarray(cases.numpy(array)).size for array in arrays)
    allocated *= 4 if dtype == "float32" else 2
    assert cache.nbytes == spec.nbytes == allocated
    assert spec.bytes_per_token * B * 521 == spec.nbytes
    assert cache.capacity == 521
    if keras.backend.backend() == "jax":
        assert cache.nbytes == sum(array.nbytes for array in arrays)
    for array in arrays:
        assert keras.backend.standardize_dtype(array.dtype) == dtype
        assert not cases.numpy(array).any()


def test_values_may_have_another_size():
    cache = CacheSpec(B, 521, K, H, value_dim=5).allocate()
    assert [v.shape[3] for v in cache.values] == [5, 5, 5]
    assert cache.nbytes == 4 * B * 521 * K * (H + 5)
    with pytest.raises(ValueError, match="key_dim=7, value_dim=5"):
        cache.to_dense()


@pytest.mark.parametrize(
    "changed, words",
    [
        (dict(batch_size=0), ["`batch_size`", "0"]),
        (dict(capacity=-1), ["`capacity`", "-1"]),
        (dict(capacity=1.5), ["`capacity`", "1.5"]),
        (dict(capacity=True), ["`capacity`", "True"]),
        (dict(num_key_value_heads=None), ["`num_key_value_heads`", "None"]),
        (dict(head_dim="7"), ["`head_dim`", "'7'"]),
        (dict(value_dim=0), ["`value_dim`", "0"]),
        (dict(dtype="int8"), ["`dtype`", "'int8'", "bfloat16"]),
        (dict(dtype="float64"), ["`dtype`", "'float64'", "float32"]),
        (dict(layout="sparse"), ["`layout`", "'sparse'", "dense"]),
        (dict(layout="dense", value_dim=5), ["head_dim=7", "value_dim=5"]),
    ],
    ids=str,
)
def test_bad_specs(changed, words):
    good = dict(batch_size=B, capacity=5, num_key_value_heads=K, head_dim=H)
    with pytest.raises(ValueError) as caught:
        CacheSpec(**{**good, **changed})
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_immutable(layout):
    """Updating gives a new cache; the old one, and its arrays, stay."""
    cache = CacheSpec(B, 263, K, H, layout=layout).allocate()
    assert isinstance(cache, Cache)
    for field in dataclasses.fields(cache):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(cache, field.name, None)
    entry = keras.ops.convert_to_tensor(cases.noise(B, 11, K, H))
    updated, view = cache.update(entry, entry, 251)
    assert type(updated) is type(cache)
    assert sum(segment.positions.shape[1] for segment in view.segments) == 263
    held = [cases.entries(getattr(c, "tensor", c)) for c in (cache, updated)]
    assert not held[0].any()
    np.testing.assert_array_equal(held[1][:, 0, 251:262], cases.numpy(entry))
    np.testing.assert_array_equal(held[1][:, 1, 251:262], cases.numpy(entry))
    assert not held[1][:, :, :251].any() and not held[1][:, :, 262:].any()


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_view_knows_positions_and_fill(layout):
    cache = CacheSpec(B, 521, K, H, layout=layout).allocate()
    entry = keras.ops.ones((B, 5, K, H))
    for index, fill in ((3, [8]), (cases.int32([0, 1, 516]), [5, 6, 521])):
        _, view = cache.update(entry, entry, index)
        assert cases.numpy(view.fill).tolist() == fill
        positions = [cases.numpy(s.positions)[0] for s in view.segments]
        np.testing.assert_array_equal(np.concatenate(positions), np.arange(521))
        for segment, size in zip(view.segments, segment_sizes(521), strict=True):
            scores = segment.scores(keras.ops.ones((B * K, 13, H)), 0, size)
            assert tuple(scores.shape) == (B * K, 13, size)
            assert tuple(segment.mix(scores, 0, size).shape) == (B * K, 13, H)
    assert cache.view().fill is None


@pytest.mark.jax_only
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_pytree(layout):
    """Through `tree_util`, `jit` and donation, and as a loop's state."""
    import jax

    spec = CacheSpec(B, 521, K, H, layout=layout)
    cache = spec.allocate()
    leaves, structure = jax.tree_util.tree_flatten(cache)
    assert len(leaves) == (1 if layout == "dense" else 6)
    assert type(jax.tree_util.tree_unflatten(structure, leaves)) is type(cache)
    doubled = jax.tree_util.tree_map(lambda x: x + 2, cache)
    assert float(jax.tree_util.tree_leaves(doubled)[0].min()) == 2

    def step(cache, index):
        entry = keras.ops.ones((B, 1, K, H))
        return cache.update(entry, entry, index)[0]

    plain = jax.jit(step)(cache, 3)
    donated = jax.jit(step, donate_argnums=0)(spec.allocate(), 3)
    looped = jax.lax.fori_loop(3, 4, lambda i, cache: step(cache, i), cache)
    for given in (plain, donated, looped):
        assert type(given) is type(cache)
        held = cases.entries(getattr(given, "tensor", given))
        assert (held[:, :, 3] == 1).all() and held.sum() == B * 2 * K * H

    used = spec.allocate()
    arrays = jax.tree_util.tree_leaves(used)
    jax.jit(step, donate_argnums=0)(used, 3)
    assert all(array.is_deleted() for array in arrays)


def test_static_cache_of_any_segments():
    """Whoever grows a cache adds a segment of whatever size."""
    sizes = (5, 3, 11)
    cache = StaticCache(
        tuple(keras.ops.zeros((B, K, H, size)) for size in sizes),
        tuple(keras.ops.zeros((B, K, size, H)) for size in sizes),
    )
    layer = cases.make_layer(4, H, num_key_value_heads=K)
    x = cases.noise(B, 13, cases.D)

    @cases.compiled
    def step(cache):
        call = dict(cache_update_index=4, use_causal_mask=True)
        return layer(x, x, cache=cache, **call)[0]

    output, dense = step(cache), step(cache.to_dense())
    np.testing.assert_allclose(
        cases.numpy(output), cases.numpy(dense), rtol=0, atol=1e-5
    )
