"""A cache keeps its dtype, and narrow floats keep their sums wide."""

import attention_cases as cases
import jax
import keras
import ml_dtypes
import numpy as np
import pytest
import reference

from keras_kvcache.caches import StaticCache
from keras_kvcache.layers import DecoderBlock

B, T, S = 3, 5, 17
POLICIES = ("float32", "bfloat16", "float16", "mixed_bfloat16", "mixed_float16")


@pytest.mark.parametrize(
    "policy, layout",
    [*((policy, "head_major") for policy in POLICIES), ("mixed_bfloat16", "dense")],
)
def test_cache_keeps_its_dtype(policy, layout):
    """What was stored stays as it was to the bit, whatever the layer computes in."""
    layer = cases.make_layer(
        4, 6, num_key_value_heads=2, rotary_embedding=cases.rotary_layer(), dtype=policy
    )
    x = cases.noise(B, T, cases.D)
    stored = cases.noise(B, 2, S, 2, 6, seed=1)
    expected, _ = reference.multi_head_attention(
        layer, x, x, causal=True, rotary=dict(base=50.0)
    )
    step = cases.compiled(
        lambda x, cache, index: layer(
            x, x, cache=cache, cache_update_index=index, use_causal_mask=True
        )
    )
    for dtype in ("float32", "bfloat16", "float16"):
        tensor = keras.ops.convert_to_tensor(stored, dtype=dtype)
        cache = tensor if layout == "dense" else StaticCache.from_dense(tensor)
        output, updated = step(x, cache, cases.int32(0))
        assert keras.backend.standardize_dtype(output.dtype) == layer.compute_dtype
        np.testing.assert_allclose(cases.numpy(output), expected, rtol=0, atol=0.05)
        arrays = jax.tree_util.tree_leaves(updated)
        for array in arrays:
            assert keras.backend.standardize_dtype(array.dtype) == dtype
        held, before = cases.entries(updated), cases.numpy(tensor)
        np.testing.assert_array_equal(held[:, :, T:], before[:, :, T:])


@pytest.mark.parametrize("inside", ["model", "block"])
def test_nobody_outside_casts_the_cache(inside):
    """Neither an autocasting model around the layer nor a decoder block."""
    x = keras.ops.convert_to_tensor(cases.noise(B, T, cases.D))
    cache = keras.ops.convert_to_tensor(0.1 + np.zeros((B, 2, S, 3, 7)), "float32")
    if inside == "block":
        layer = DecoderBlock(3, 13, head_dim=7, dtype="bfloat16")
        names = ("self_attention_cache", "self_attention_cache_update_index")
        output, cache = layer(x, **dict(zip(names, (cache, 0), strict=True)))
    else:
        query = keras.Input((T, cases.D), batch_size=B)
        cached = keras.Input((2, S, 3, 7), batch_size=B)
        layer = cases.make_layer(dtype="bfloat16")
        outputs = layer(query, query, cache=cached, cache_update_index=0)
        output, cache = keras.Model([query, cached], outputs)([x, cache])
    assert keras.backend.standardize_dtype(output.dtype) == "bfloat16"
    assert keras.backend.standardize_dtype(cache.dtype) == "float32"
    np.testing.assert_array_equal(cases.numpy(cache)[:, :, T:], np.float32(0.1))


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sums_are_float32(layout, dtype):
    """4099 values of 1 average to 1; summed in bfloat16 they stop at 256.

    The scores are all 0, so that each weight is 1 before it is divided.
    """
    layer = cases.make_layer(1, 7, width=7, use_bias=False, dtype=dtype)
    identity = np.eye(7).reshape(7, 1, 7)
    layer.query_dense.kernel.assign(np.zeros((7, 1, 7)))
    layer.output_dense.kernel.assign(identity.transpose(1, 2, 0))
    cache = cases.make_cache(layer, 1, 4099, layout, dtype, filler=1.0)
    read = cases.compiled(lambda x, cache: layer(x, None, cache=cache)[0])
    output = read(
        cases.noise(1, 1, 7, dtype=getattr(np, dtype, ml_dtypes.bfloat16)), cache
    )
    np.testing.assert_array_equal(cases.numpy(output), np.ones((1, 1, 7)))


def test_layers_of_another_dtype_inside():
    """A float32 rotary layer or norm doesn't change what the layer computes in."""
    layer = cases.make_layer(
        4,
        6,
        dtype="bfloat16",
        rotary_embedding=cases.rotary_layer(dtype="float32"),
        query_norm=keras.layers.RMSNormalization(dtype="float32", name="query_norm"),
    )
    x = cases.noise(B, T, cases.D)
    for causal in (False, True):
        call = dict(use_causal_mask=causal)
        output = cases.compiled(lambda x, call=call: layer(x, x, **call))(x)
        assert keras.backend.standardize_dtype(output.dtype) == "bfloat16"
        expected, _ = reference.multi_head_attention(
            layer, x, x, causal=causal, rotary=dict(base=50.0)
        )
        np.testing.assert_allclose(cases.numpy(output), expected, rtol=0, atol=0.05)
    cache = cases.make_cache(layer, B, T, "dense", filler=0.0)
    step = cases.compiled(lambda x, c: layer(x, x, cache=c, cache_update_index=0)[1])
    held = cases.entries(step(x, cache))
    np.testing.assert_array_equal(held, held.astype(ml_dtypes.bfloat16))


@pytest.mark.skipif(
    keras.backend.backend() == "jax", reason="JAX has no float64 unless told so"
)
def test_float64_is_not_narrowed():
    layer = cases.make_layer(dtype="float64", logit_soft_cap=1.5)
    x = cases.noise(B, T, cases.D, dtype="float64")
    expected, _ = reference.multi_head_attention(layer, x, x, soft_cap=1.5)
    np.testing.assert_allclose(cases.numpy(layer(x, x)), expected, rtol=0, atol=1e-13)
