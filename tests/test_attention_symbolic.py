"""The layer in functional models, in saved ones and in compiled programs."""

import attention_cases as cases
import keras
import numpy as np
import pytest
import reference

from keras_kvcache.layers import CachedMultiHeadAttention, RotaryEmbedding

B, T, S, D = 3, 5, 17, cases.D


def model_inputs(batch_size=None, length=T):
    """Tokens, a dense cache and one index a row."""
    return (
        keras.Input((length, D), batch_size=batch_size, name="x"),
        keras.Input((2, S, 2, 6), batch_size=batch_size, name="cache"),
        keras.Input((), batch_size=batch_size, dtype="int32", name="index"),
    )


def make_layer():
    """A layer as users build it: by its first call, here in a model."""
    return CachedMultiHeadAttention(
        4,
        6,
        num_key_value_heads=2,
        rotary_embedding=RotaryEmbedding(50.0),
        kernel_initializer=keras.initializers.Constant(0.1),
    )


def feeds():
    x = keras.ops.convert_to_tensor(cases.noise(B, T, D))
    cache = keras.ops.convert_to_tensor(cases.noise(B, 2, S, 2, 6, seed=1))
    return x, cache, cases.int32([0, 7, 12])


@pytest.mark.parametrize("scores", [False, True])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("batch_size", [None, B])
def test_shapes_of_every_return(cached, scores, batch_size):
    x, cache, index = model_inputs(batch_size)
    call = dict(return_attention_scores=scores)
    if cached:
        call.update(cache=cache, cache_update_index=index)
    layer = make_layer()
    returned = layer(x, x, **call)
    returned = returned if isinstance(returned, tuple) else (returned,)
    expected = [(batch_size, T, D)]
    if scores:
        expected.append((batch_size, 4, T, S if cached else T))
    if cached:
        expected.append((batch_size, 2, S, 2, 6))
    assert [tensor.shape for tensor in returned] == expected
    eager = feeds()
    if cached:
        call.update(cache=eager[1], cache_update_index=eager[2])
    real = layer(eager[0], eager[0], **call)
    real = real if isinstance(real, tuple) else (real,)
    for tensor, symbol in zip(real, returned, strict=True):
        assert tuple(tensor.shape)[1:] == symbol.shape[1:]
        assert keras.backend.standardize_dtype(tensor.dtype) == symbol.dtype


@pytest.mark.parametrize("policy", ["bfloat16", "mixed_float16"])
def test_dtypes_of_every_return(policy):
    x, _, index = model_inputs()
    cache = keras.Input((2, S, 3, 7), dtype="float32")
    layer = cases.make_layer(dtype=policy)
    output, scores, cache = layer(
        x, x, cache=cache, cache_update_index=index, return_attention_scores=True
    )
    compute = keras.DTypePolicy(policy).compute_dtype
    assert (output.dtype, scores.dtype, cache.dtype) == (compute, compute, "float32")


def test_reading_only():
    layer = cases.make_layer(4, 6, num_key_value_heads=2)
    x, cache, _ = model_inputs()
    for value in (None, x):
        output, scores, same = layer(
            x, value, cache=cache, return_attention_scores=True
        )
        assert output.shape == (None, T, D)
        assert scores.shape == (None, 4, T, S)
        assert same.shape == cache.shape


def test_saved_model(tmp_path):
    """Built, run, saved, loaded and run again, with each row at its own index."""
    x, cache, index = model_inputs()
    layer = make_layer()
    returned = layer(
        x,
        x,
        cache=cache,
        cache_update_index=index,
        use_causal_mask=True,
        return_attention_scores=True,
    )
    model = keras.Model([x, cache, index], returned)
    for seed, weight in enumerate(layer.trainable_weights):
        weight.assign(0.3 * cases.noise(*weight.shape, seed=seed))
    given = feeds()
    expected = model(list(given))
    for row, first in enumerate((0, 7, 12)):
        stored = cases.numpy(given[1])[row]
        kept = cases.numpy(expected[2])[row]
        other = np.r_[:first, first + T : S]
        np.testing.assert_array_equal(kept[:, other], stored[:, other])
        assert (kept[:, first : first + T] != stored[:, first : first + T]).all()
    # Row 0 has nothing stored before it.
    alone, _ = reference.multi_head_attention(
        layer, *[cases.numpy(given[0])[:1]] * 2, causal=True, rotary=dict(base=50.0)
    )
    np.testing.assert_allclose(cases.numpy(expected[0])[:1], alone, rtol=0, atol=1e-4)

    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    calls = [
        lambda feeds: loaded(feeds),
        lambda feeds: loaded.predict(feeds, verbose=0),
    ]
    if keras.backend.backend() == "jax":
        import jax

        calls.append(jax.jit(lambda feeds: loaded(feeds)))
    for call in calls:
        for got, value in zip(call(list(given)), expected, strict=True):
            np.testing.assert_allclose(
                cases.numpy(keras.ops.convert_to_tensor(got)),
                cases.numpy(value),
                rtol=0,
                atol=1e-5,
            )


def test_inside_a_layer_without_a_spec():
    """Keras finds the shapes by running the layer on made-up tensors."""

    class Around(keras.layers.Layer):
        def __init__(self):
            super().__init__(autocast=False)
            self.attention = cases.make_layer(4, 6, num_key_value_heads=2)

        def call(self, x, cache, index):
            return self.attention(x, x, cache=cache, cache_update_index=index)

    x, cache, index = model_inputs()
    around = Around()
    output, updated = around(x, cache, index)
    assert output.shape == (None, T, D)
    assert updated.shape == (None, 2, S, 2, 6)
    model = keras.Model([x, cache, index], [output, updated])
    given = feeds()
    for got, value in zip(model(list(given)), around(*given), strict=True):
        np.testing.assert_allclose(
            cases.numpy(got), cases.numpy(value), rtol=0, atol=1e-5
        )


def test_while_loop_with_a_traced_index():
    layer = cases.make_layer(4, 6, num_key_value_heads=2)
    x = keras.ops.convert_to_tensor(cases.noise(B, T, D))
    cache = cases.make_cache(layer, B, S, "dense", filler=0.0)
    expected, _ = reference.multi_head_attention(
        layer, cases.numpy(x), cases.numpy(x), causal=True
    )

    def body(i, outputs, cache):
        token = keras.ops.slice(x, (0, i, 0), (B, 1, D))
        output, cache = layer(token, token, cache=cache, cache_update_index=i)
        return i + 1, keras.ops.slice_update(outputs, (0, i, 0), output), cache

    _, outputs, _ = keras.ops.while_loop(
        lambda i, outputs, cache: i < T, body, [0, keras.ops.zeros_like(x), cache]
    )
    np.testing.assert_allclose(cases.numpy(outputs), expected, rtol=0, atol=1e-5)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="about tf.function")
@pytest.mark.parametrize("mode", ["plain", "scores", "soft_cap", "update", "read"])
def test_tensorflow_graph_of_unknown_sizes(mode):
    """One trace serves any batch and any number of tokens."""
    import tensorflow as tf

    layer = cases.make_layer(
        4,
        6,
        num_key_value_heads=2,
        rotary_embedding=cases.rotary_layer(),
        logit_soft_cap=3.0 if mode == "soft_cap" else None,
    )
    call = dict(use_causal_mask=True, return_attention_scores=mode == "scores")

    def step(x, cache, index, mask):
        if mode == "update":
            return layer(x, x, cache=cache, cache_update_index=index, **call)[0]
        if mode == "read":
            return layer(x, None, cache=cache)[0]
        return layer(x, x, attention_mask=mask, **call)

    traced = tf.function(
        step,
        input_signature=[
            tf.TensorSpec((None, None, D), "float32"),
            tf.TensorSpec((None, 2, S, 2, 6), "float32"),
            tf.TensorSpec((None,), "int32"),
            tf.TensorSpec((None, None, None), "bool"),
        ],
    )
    for batch, length in ((1, 1), (B, T)):
        mask = np.eye(length, dtype=bool)[None] | (
            cases.noise(batch, length, length) > 0
        )
        given = (
            cases.noise(batch, length, D),
            cases.noise(batch, 2, S, 2, 6, seed=1),
            np.arange(batch, dtype="int32"),
            mask,
        )
        for got, expected in zip(
            tf.nest.flatten(traced(*given)), tf.nest.flatten(step(*given)), strict=True
        ):
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
