"""The layer in the place of keras-hub's layer of the same name."""

import attention_cases as cases
import keras
import numpy as np
import pytest

from keras_kvcache.layers import CachedMultiHeadAttention

keras_hub = pytest.importorskip("keras_hub")

B, T, S, N, H = 3, 5, 17, 2, 7
D = N * H
CLOSE = dict(rtol=0, atol=1e-5)


def layers(**options):
    """Ours and keras-hub's with the same weights, which go both ways."""
    ours = cases.make_layer(N, H, width=D, **options)
    theirs = keras_hub.layers.CachedMultiHeadAttention(N, H, **options)
    theirs.build((None, None, D), (None, None, D))
    theirs.set_weights(ours.get_weights())
    ours.set_weights([weight / 2 for weight in theirs.get_weights()])
    theirs.set_weights(ours.get_weights())
    return ours, theirs


def test_weights_are_the_same():
    pairs = zip(*(layer.weights for layer in layers(dropout=0.1)), strict=True)
    for ours, theirs in pairs:
        assert ours.path.split("/", 1)[1] == theirs.path.split("/", 1)[1]
        assert ours.shape == theirs.shape
        np.testing.assert_array_equal(cases.numpy(ours), cases.numpy(theirs))


@pytest.mark.parametrize("scores", [False, True])
@pytest.mark.parametrize("mode", ["plain", "read", "update"])
def test_same_outputs(mode, scores):
    """With a mask, as keras-hub's own layer attends empty slots without one."""
    x, slots = cases.noise(B, T, D), T if mode == "plain" else S
    mask = np.arange(slots) <= (3 if mode == "update" else 0) + np.arange(T)[:, None]
    call = dict(attention_mask=mask, return_attention_scores=scores)
    if mode != "plain":
        call["cache"] = keras.ops.convert_to_tensor(cases.noise(B, 2, S, N, H, seed=1))
    if mode == "update":
        call["cache_update_index"] = 3
    given = []
    for layer in layers():
        returned = cases.compiled(lambda x, layer=layer: layer(x, x, **call))(x)
        given.append(returned if isinstance(returned, (tuple, list)) else (returned,))
    assert len(given[0]) == 1 + scores + (mode != "plain")
    for ours, theirs in zip(*given, strict=True):
        np.testing.assert_allclose(cases.numpy(ours), cases.numpy(theirs), **CLOSE)


@pytest.fixture
def decoders(monkeypatch):
    """keras-hub's decoder block around our layer and around its own."""
    module = keras_hub.src.layers.modeling.transformer_decoder

    def make(encoder, **options):
        blocks = []
        for attention in (CachedMultiHeadAttention, module.CachedMultiHeadAttention):
            monkeypatch.setattr(module, "CachedMultiHeadAttention", attention)
            block = keras_hub.layers.TransformerDecoder(11, N, **options)
            block.build((None, None, D), (None, None, D) if encoder else None)
            for seed, weight in enumerate(block.trainable_weights):
                weight.assign(0.3 * cases.noise(*weight.shape, seed=seed))
            assert type(block._self_attention_layer) is attention
            blocks.append(block)
        return blocks

    return make


@pytest.mark.parametrize("encoder", [False, True])
@pytest.mark.parametrize("normalize_first", [False, True])
def test_inside_the_decoder_of_keras_hub(decoders, encoder, normalize_first):
    ours, theirs = decoders(encoder, normalize_first=normalize_first)
    x, encoded = cases.noise(B, T, D), cases.noise(B, T, D, seed=1)
    padding = np.arange(T) < np.array([[5], [3], [4]])
    call = dict(decoder_padding_mask=padding)
    if encoder:
        call.update(encoder_sequence=encoded, encoder_padding_mask=padding)
    expected = theirs(x, **call)
    np.testing.assert_allclose(
        cases.numpy(ours(x, **call)), cases.numpy(expected), **CLOSE
    )


@pytest.mark.parametrize("encoder", [False, True])
def test_loop_in_the_decoder_of_keras_hub(decoders, encoder):
    """Filled once, then decoded token by token with a traced index."""
    x = keras.ops.convert_to_tensor(cases.noise(B, T, D))
    encoded = keras.ops.convert_to_tensor(cases.noise(B, T, D, seed=1))
    outputs = []
    for block in decoders(encoder):
        shape = (B, 2, T, N, H)
        caches = [keras.ops.zeros(shape)] * (2 if encoder else 1)

        def step(token, index, caches, fill=None, block=block):
            call = dict(
                self_attention_cache=caches[0],
                self_attention_cache_update_index=index,
            )
            if encoder:
                call.update(
                    encoder_sequence=encoded,
                    cross_attention_cache=caches[1],
                    cross_attention_cache_update_index=fill,
                )
            return block(token, **call)

        whole, *filled = step(x, 0, caches, 0)

        def body(i, outputs, *caches, step=step):
            token = keras.ops.slice(x, (0, i, 0), (B, 1, D))
            output, *caches = step(token, i, caches)
            return i + 1, keras.ops.slice_update(outputs, (0, i, 0), output), *caches

        start = [caches[0], *filled[1:]]
        _, looped, *after = keras.ops.while_loop(
            lambda i, *_: i < T, body, [0, keras.ops.zeros_like(x), *start]
        )
        np.testing.assert_allclose(cases.numpy(looped), cases.numpy(whole), **CLOSE)
        for got, expected in zip(after, filled, strict=True):
            np.testing.assert_allclose(cases.numpy(got), cases.numpy(expected), **CLOSE)
        outputs.append([whole, *filled])
    for got, expected in zip(*outputs, strict=True):
        np.testing.assert_allclose(cases.numpy(got), cases.numpy(expected), **CLOSE)


def test_mask_goes_through_the_decoder_of_keras_hub(decoders):
    block, _ = decoders(encoder=False)
    embedding = keras.layers.Embedding(13, D, mask_zero=True)
    ids = np.array([[3, 5, 0, 0], [1, 2, 4, 0]])
    np.testing.assert_array_equal(
        cases.numpy(block(embedding(ids))._keras_mask), ids != 0
    )


@pytest.mark.parametrize("encoder, weights, seeds", [(False, 16, 3), (True, 26, 5)])
def test_decoder_of_keras_hub_has_the_same_variables(decoders, encoder, weights, seeds):
    for block in decoders(encoder, dropout=0.1):
        assert len(block.trainable_weights) == weights
        assert len(block.non_trainable_variables) == seeds


def test_dropping_everything(decoders):
    """At a rate near 1 the decoder is its two norms; our layer drops as theirs."""
    block, _ = decoders(encoder=False, dropout=0.99999)
    x = keras.ops.convert_to_tensor(cases.noise(B, T, D))
    expected = block._feedforward_layer_norm(block._self_attention_layer_norm(x))
    np.testing.assert_allclose(
        cases.numpy(block(x, training=True)), cases.numpy(expected), **CLOSE
    )


def test_what_others_reach_into():
    """keras-hub's models use these parts of the layer."""
    layer = cases.make_layer()
    x = cases.noise(B, T, cases.D)
    value = layer._value_dense(x)
    weights = np.full((B, 3, T, T), 1 / T, "float32")
    mixed = keras.ops.einsum(layer._combine_equation, weights, value)
    expected = cases.numpy(value).mean(axis=1, keepdims=True).repeat(T, 1)
    np.testing.assert_allclose(cases.numpy(mixed), expected, **CLOSE)
    assert tuple(layer._output_dense(mixed).shape) == (B, T, cases.D)


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_rotary_layer_of_keras_hub(layout):
    """It may be given to our layer, and gives what ours gives."""
    x = cases.noise(B, T, cases.D)
    outputs = []
    for rotary in (
        cases.rotary_layer(),
        keras_hub.layers.RotaryEmbedding(max_wavelength=50.0),
    ):
        layer = cases.make_layer(4, 6, rotary_embedding=rotary)
        cache = cases.make_cache(layer, B, S, layout, filler=0.0)
        step = cases.compiled(
            lambda x, cache, index, layer=layer: layer(
                x, x, cache=cache, cache_update_index=index, use_causal_mask=True
            )
        )
        output, cache = step(x, cache, cases.int32([0, 3, 7]))
        outputs.append((output, cases.entries(cache)))
    np.testing.assert_allclose(
        cases.numpy(outputs[0][0]), cases.numpy(outputs[1][0]), **CLOSE
    )
    np.testing.assert_allclose(outputs[0][1], outputs[1][1], **CLOSE)
