"""Masks: the user's own, those that inputs carry, and those that hide everything."""

import attention_cases as cases
import keras
import numpy as np
import pytest
import reference

B, T, S = 3, 5, 17
CLOSE = dict(rtol=0, atol=1e-5)


def random_mask(*shape):
    mask = cases.noise(*shape, seed=5) > -0.3
    mask[..., 0] = True
    return mask


@pytest.mark.parametrize(
    "shape",
    [
        (T, S),
        (1, S),
        (T, 1),
        (B, T, S),
        (B, 1, S),
        (1, T, S),
        (B, 6, T, S),
        (1, 6, 1, S),
    ],
    ids=str,
)
def test_explicit_mask_of_a_cache(shape):
    """It takes the place of the fill: slots past index + T may be attended."""
    layer = cases.make_layer(6, 7, num_key_value_heads=2)
    stored, x = cases.noise(B, S, cases.D), cases.noise(B, T, cases.D, seed=1)
    whole = stored.copy()
    whole[:, 2 : 2 + T] = x
    mask = random_mask(*shape) if shape[-1] != 1 else np.ones(shape, bool)
    aligned = mask[:, None] if mask.ndim == 3 else mask
    full = np.broadcast_to(aligned, (B, 6, T, S))
    expected, weights = reference.multi_head_attention(layer, x, whole, mask=full)
    cache = cases.make_cache(layer, B, S, "head_major")
    write = cases.compiled(lambda x, c: layer(x, x, cache=c, cache_update_index=0))
    _, cache = write(stored, cache)

    @cases.compiled
    def step(x, cache, mask):
        call = dict(cache=cache, cache_update_index=2, attention_mask=mask)
        return *layer(x, x, **call), *layer(x, x, return_attention_scores=True, **call)

    for dtype in ("bool", "float32", "int32"):
        output, _, output_beside_scores, scores, _ = step(x, cache, mask.astype(dtype))
        np.testing.assert_allclose(cases.numpy(output), expected, **CLOSE)
        np.testing.assert_allclose(cases.numpy(output_beside_scores), expected, **CLOSE)
        np.testing.assert_allclose(cases.numpy(scores), weights, **CLOSE)


def test_explicit_mask_across_segments():
    layer = cases.make_layer()
    x = cases.noise(1, 263, cases.D)
    mask = random_mask(1, 1, 263, 263)
    full = np.broadcast_to(mask, (1, 3, 263, 263))
    expected, _ = reference.multi_head_attention(layer, x, x, mask=full)
    cache = cases.make_cache(layer, 1, 263, "head_major")
    step = cases.compiled(
        lambda x, cache: layer(
            x, x, cache=cache, cache_update_index=0, attention_mask=mask
        )
    )
    np.testing.assert_allclose(cases.numpy(step(x, cache)[0]), expected, **CLOSE)


@pytest.mark.parametrize("cached", [False, True])
def test_mask_is_combined_with_causality_and_window(cached):
    layer = cases.make_layer(sliding_window=3)
    x, mask = cases.noise(B, T, cases.D), random_mask(B, T, T)
    expected, _ = reference.multi_head_attention(
        layer, x, x, causal=True, window=3, mask=np.repeat(mask[:, None], 3, 1)
    )
    rules = dict(attention_mask=mask, use_causal_mask=True)
    if cached:
        cache = cases.make_cache(layer, B, T, "dense")
        rules.update(cache=cache, cache_update_index=0)
    output = cases.compiled(lambda x: layer(x, x, **rules))(x)
    output = output[0] if cached else output
    np.testing.assert_allclose(cases.numpy(output), expected, **CLOSE)


@pytest.mark.parametrize(
    "kind, dtype",
    [("grouped", "float32"), ("soft_cap", "bfloat16"), ("plain", "float16")],
)
@pytest.mark.parametrize("mode", ["plain", "read", "update"])
def test_nothing_to_attend_gives_zeros(mode, kind, dtype):
    """Zeros before the output projection: the output is its bias. Never NaN."""
    layer, _ = cases.make_kind(kind, dtype=dtype)
    x = cases.noise(B, T, cases.D)
    mask = random_mask(B, T, T)
    mask[1, 2] = mask[0, 0] = False
    call = dict(attention_mask=mask)
    if mode != "plain":
        filler = 3e4 if mode == "update" else 0.5
        call["cache"] = cases.make_cache(layer, B, T, "dense", dtype, filler)
    if mode == "update":
        call["cache_update_index"] = 0

    def step(x):
        given = layer(x, x, **call)
        scored = layer(x, x, return_attention_scores=True, **call)
        return (given if mode == "plain" else given[0]), scored[0], scored[1]

    if (dtype, mode) != ("float16", "plain"):
        # XLA on a CPU doesn't compile Keras' fused attention in float16.
        step = cases.compiled(step)
    output, output_beside_scores, scores = map(cases.numpy, step(x))
    bias = cases.numpy(keras.ops.cast(layer.output_dense.bias, dtype))
    for given in (output, output_beside_scores):
        assert np.isfinite(given).all()
        for row, token in ((1, 2), (0, 0)):
            np.testing.assert_array_equal(given[row, token], bias)
        assert (abs(given[2] - bias) > 1e-3).any(-1).all()
    np.testing.assert_array_equal(scores[1, :, 2], 0)


def test_masks_of_inputs_without_cache():
    """As Keras' layer honours them, and passes on the query's."""
    ours = cases.make_layer()
    theirs = keras.layers.MultiHeadAttention(3, 7)
    theirs.build((None, None, cases.D), (None, None, cases.D))
    theirs.set_weights(ours.get_weights())
    embedding = keras.layers.Embedding(13, cases.D, mask_zero=True)
    queries = np.array([[3, 5, 7, 0, 0], [2, 1, 12, 4, 0], [1, 2, 3, 4, 5]])
    values = np.array(
        [[1, 2, 0, 0, 0, 0, 0], [3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 0, 0, 0, 0]]
    )
    outputs = []
    for layer in (ours, theirs):
        query, value = embedding(queries), embedding(values)
        output = layer(query, value)
        np.testing.assert_array_equal(cases.numpy(output._keras_mask), queries != 0)
        outputs.append(cases.numpy(output))
    real = queries != 0
    np.testing.assert_allclose(outputs[0][real], outputs[1][real], **CLOSE)
    full = (real[:, :, None] & (values != 0)[:, None])[:, None].repeat(3, 1)
    expected, _ = reference.multi_head_attention(
        ours, cases.numpy(query), cases.numpy(value), mask=full
    )
    np.testing.assert_allclose(outputs[0], expected, **CLOSE)


def test_masks_of_inputs_stay_on_them(recwarn):
    """The caller may use the input once more, as a residual connection does."""
    embedding = keras.layers.Embedding(13, cases.D, mask_zero=True)
    x = embedding(np.array([[3, 5, 0]]))
    cases.make_layer()(x, x)
    np.testing.assert_array_equal(cases.numpy(x._keras_mask), [[True, True, False]])
    assert not [w for w in recwarn if "does not support masking" in str(w.message)]


def test_masks_of_inputs_with_a_cache():
    """A value's mask hides the entries that this call writes."""
    layer = cases.make_layer()
    stored, x = cases.noise(B, 3, cases.D), cases.noise(B, T, cases.D, seed=1)
    value_mask = np.array([[1, 1, 0, 1, 0], [1, 1, 1, 1, 1], [0, 1, 1, 0, 0]], bool)
    query_mask = np.array([[1, 1, 1, 1, 1], [1, 0, 1, 1, 1], [1, 1, 1, 1, 0]], bool)
    seen = np.concatenate([np.ones((B, 3), bool), value_mask], axis=1)
    full = seen[:, None, None] & query_mask[:, None, :, None]
    full = np.broadcast_to(full, (B, 3, T, 3 + T))
    expected, _ = reference.multi_head_attention(
        layer, x, np.concatenate([stored, x], axis=1), mask=full
    )

    @cases.compiled
    def both(cache):
        _, cache = layer(stored, stored, cache=cache, cache_update_index=0)
        return layer(
            x,
            x,
            cache=cache,
            cache_update_index=3,
            query_mask=query_mask,
            value_mask=value_mask,
        )

    output, _ = both(cases.make_cache(layer, B, S, "head_major"))
    np.testing.assert_allclose(cases.numpy(output), expected, **CLOSE)


def test_a_value_that_is_ignored_is_ignored_with_its_mask():
    """Reading a cache, the source's mask must be given as an attention mask."""
    layer = cases.make_layer()
    query, value = cases.noise(B, T, cases.D), cases.noise(B, 7, cases.D, seed=1)
    mask = random_mask(B, 7)
    other_mask = np.zeros((B, 3), bool)
    cache = cases.make_cache(layer, B, 7, "dense")

    @cases.compiled
    def steps(cache):
        filled, cache = layer(
            query, value, cache=cache, cache_update_index=0, value_mask=mask
        )
        read = layer(query, None, cache=cache, attention_mask=mask[:, None])[0]
        seen = layer(query, None, cache=cache)[0]
        dummy = layer(query, value[:, :3], cache=cache, value_mask=other_mask)[0]
        return filled, read, seen, dummy

    plain = layer(query, value, value_mask=mask)
    filled, read, seen, dummy = (cases.numpy(output) for output in steps(cache))
    np.testing.assert_allclose(filled, cases.numpy(plain), **CLOSE)
    np.testing.assert_allclose(read, cases.numpy(plain), **CLOSE)
    np.testing.assert_array_equal(seen, dummy)
    assert abs(seen - read).max() > 0.01
