"""What slots hold that nobody attends never counts, on every backend."""

import attention_cases as cases
import jax
import keras
import numpy as np
import pytest
import reference

from keras_kvcache.caches import CacheSpec

B, T, S = 2, 7, 300
CODECS = ("float32", "bfloat16", "float16", "int8", "int4")
# Numbers that stand for NaN where a dtype has none: bits of a bfloat16 in an int16.
NAN = {"int8": 127, "uint8": 255, "int16": 0x7FFF, "int32": None}


def spoilt(cache):
    """A cache all of whose slots hold NaN, as memory that nobody wrote may."""

    def spoil(array):
        dtype = keras.backend.standardize_dtype(array.dtype)
        value = NAN.get(dtype, np.nan)
        return array if value is None else keras.ops.full_like(array, value)

    return jax.tree_util.tree_map(spoil, cache)


@pytest.mark.parametrize(
    "ways", ["plain", "scores", pytest.param("dropout", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("codec, layout", cases.stored(CODECS))
def test_slots_that_nobody_wrote_hold_anything(codec, layout, ways):
    options = dict(dropout=1e-9) if ways == "dropout" else {}
    layer = cases.make_layer(6, 8, num_key_value_heads=2, **options)
    x = cases.noise(B, T, cases.D)
    expected, _ = reference.multi_head_attention(layer, x, x, causal=True)

    def step(x, cache, index):
        output, *_, cache = layer(
            x,
            x,
            cache=cache,
            cache_update_index=index,
            use_causal_mask=True,
            return_attention_scores=ways == "scores",
            training=ways == "dropout",
        )
        return output, cache

    spec = CacheSpec(B, S, 2, 8, codec=codec, layout=layout)
    # Dropout keeps count of its draws, which a program of JAX can't.
    step = step if ways == "dropout" else cases.compiled(step)
    outputs = []
    for cache in (spec.allocate(), spoilt(spec.allocate())):
        first, rest = [], x
        for length in (5, 1, 1):
            index = cases.int32(T - rest.shape[1])
            output, cache = step(rest[:, :length], cache, index)
            first.append(cases.numpy(output))
            rest = rest[:, length:]
        outputs.append(np.concatenate(first, axis=1))
    clean, got = outputs
    np.testing.assert_allclose(got, clean, rtol=0, atol=1e-5)
    atol = {"float32": 1e-5, "int4": 0.4}.get(codec, 0.03)
    np.testing.assert_allclose(got, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_an_encoder_is_read_but_for_its_padding(layout):
    layer = cases.make_layer(6, 8, num_key_value_heads=2)
    value, query = cases.noise(B, 11, cases.D), cases.noise(B, 3, cases.D, seed=1)
    mask = np.arange(11) < np.reshape([11, 4], (B, 1, 1))
    expected, _ = reference.multi_head_attention(
        layer, query, value, mask=np.broadcast_to(mask[:, None], (B, 6, 3, 11))
    )
    value[1, 4:] = np.nan
    tensor = keras.ops.convert_to_tensor(value)
    spec = CacheSpec(B, 11, 2, 8, layout=layout)
    cache, _ = spec.allocate().update(*layer.project_entries(tensor, None, 0), 0)
    output, _ = layer(query, None, cache=cache, attention_mask=mask)
    np.testing.assert_allclose(cases.numpy(output), expected, rtol=0, atol=1e-5)
