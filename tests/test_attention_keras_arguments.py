"""Every argument of Keras' own layer does here what it does there."""

import attention_cases as cases
import keras
import numpy as np
import pytest

from keras_kvcache.layers import CachedMultiHeadAttention, RotaryEmbedding

B, T, S = 3, 5, 17


def outputs(layer, x):
    """What the layer makes of `x` in each of its three modes."""

    @cases.compiled
    def modes(x, cache):
        filled, cache = layer(x, x, cache=cache, cache_update_index=0)
        read, _ = layer(x, None, cache=cache[:, :, :T])
        return layer(x, x), filled, read

    cache = cases.make_cache(layer, B, S, "dense", filler=0.0)
    return [cases.numpy(output) for output in modes(x, cache)]


def test_dropout_drops_weights_in_every_mode():
    """A rate near 1 leaves the output projection of zeros: its bias."""
    layer = cases.make_layer(dropout=0.99999, seed=3)
    assert len(layer.trainable_weights) == 8
    assert len(layer.non_trainable_variables) == 1
    x = cases.noise(B, T, cases.D)
    cache = cases.make_cache(layer, B, S, "dense", filler=0.0)
    bias = np.broadcast_to(cases.numpy(layer.output_dense.bias), (B, T, cases.D))
    for call in (
        dict(),
        dict(cache=cache, cache_update_index=0),
        dict(cache=cache + 1),
    ):
        kept, dropped = (layer(x, x, training=on, **call) for on in (False, True))
        if call:
            kept, dropped = kept[0], dropped[0]
        np.testing.assert_allclose(cases.numpy(dropped), bias, rtol=0, atol=1e-5)
        assert abs(cases.numpy(kept) - bias).max() > 0.01


def test_seed_makes_dropout_repeatable():
    x = cases.noise(B, T, cases.D)
    given = [
        cases.numpy(cases.make_layer(dropout=0.5, seed=seed)(x, x, training=True))
        for seed in (3, 3, 5)
    ]
    np.testing.assert_array_equal(given[0], given[1])
    assert abs(given[0] - given[2]).max() > 0.01


def test_initializers_regularizers_and_constraints():
    layer = CachedMultiHeadAttention(
        3,
        7,
        num_key_value_heads=1,
        kernel_initializer=keras.initializers.Constant(0.5),
        bias_initializer=keras.initializers.Constant(0.25),
        kernel_regularizer=keras.regularizers.L1(2.0),
        bias_regularizer=keras.regularizers.L1(3.0),
        activity_regularizer=keras.regularizers.L2(0.125),
        kernel_constraint="non_neg",
        bias_constraint="unit_norm",
    )
    x = cases.noise(B, T, cases.D)
    layer(x, x)
    kernels = [w for w in layer.weights if w.path.endswith("kernel")]
    biases = [w for w in layer.weights if w.path.endswith("bias")]
    assert [tuple(w.shape) for w in kernels] == [
        (11, 3, 7),
        (11, 1, 7),
        (11, 1, 7),
        (3, 7, 11),
    ]
    for weights, value, kind in (
        (kernels, 0.5, keras.constraints.NonNeg),
        (biases, 0.25, keras.constraints.UnitNorm),
    ):
        for weight in weights:
            np.testing.assert_array_equal(cases.numpy(weight), value)
            assert isinstance(weight.constraint, kind)
    weight_losses = 2.0 * 0.5 * sum(np.prod(w.shape) for w in kernels)
    weight_losses += 3.0 * 0.25 * sum(np.prod(w.shape) for w in biases)
    losses = [float(loss) for loss in layer.losses]
    activity = 0.125 * sum(
        (cases.numpy(dense(x)) ** 2).sum() / B
        for dense in (layer.query_dense, layer.key_dense, layer.value_dense)
    )
    # The fourth activity loss is of the output projection.
    activity += 0.125 * (cases.numpy(layer(x, x)) ** 2).sum() / B
    np.testing.assert_allclose(sum(losses), weight_losses + activity, rtol=1e-5)


@pytest.mark.parametrize(
    "axes, shape", [(None, (2, 3, 5, 11)), (2, (2, 3, 5, 11)), ((1, 2), (2, 3, 5, 11))]
)
def test_attention_over_other_axes_is_keras_own(axes, shape):
    ours = CachedMultiHeadAttention(3, 7, attention_axes=axes)
    theirs = keras.layers.MultiHeadAttention(3, 7, attention_axes=axes)
    x = cases.noise(*shape)
    ours(x, x), theirs(x, x)
    theirs.set_weights(ours.get_weights())
    for got, expected in zip(
        ours(x, x, return_attention_scores=True),
        theirs(x, x, return_attention_scores=True),
        strict=True,
    ):
        np.testing.assert_array_equal(cases.numpy(got), cases.numpy(expected))


@pytest.mark.parametrize("axes", [1, -2, (1,), [1]])
def test_attention_axis_1_has_a_cache(axes):
    layer = cases.make_layer(attention_axes=axes)
    plain, filled, read = outputs(layer, cases.noise(B, T, cases.D))
    np.testing.assert_allclose(filled, plain, rtol=0, atol=1e-5)
    np.testing.assert_allclose(read, plain, rtol=0, atol=1e-5)


def test_several_output_axes():
    layer = cases.make_layer(output_shape=(5, 13))
    for output in outputs(layer, cases.noise(B, T, cases.D)):
        assert output.shape == (B, T, 5, 13)


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="needs a GPU to refuse")
def test_flash_attention_is_asked_of_keras():
    """On a CPU Keras refuses it; only where there is no cache it is asked."""
    layer = cases.make_layer(flash_attention=True)
    x = cases.noise(B, T, cases.D)
    with pytest.raises((ValueError, RuntimeError), match="(?i)flash|cudnn"):
        layer(x, x)
    cache = cases.make_cache(layer, B, S, "dense")
    filled, _ = layer(x, x, cache=cache, cache_update_index=0)
    layer = cases.make_layer(flash_attention=False)
    np.testing.assert_allclose(
        cases.numpy(filled), cases.numpy(layer(x, x)), rtol=0, atol=1e-5
    )


def test_config_round_trip():
    layer = CachedMultiHeadAttention(
        6,
        14,
        value_dim=5,
        dropout=0.1,
        use_bias=False,
        output_shape=(19,),
        sliding_window=23,
        use_gate=True,
        seed=7,
        kernel_initializer="ones",
        num_key_value_heads=2,
        rotary_embedding=RotaryEmbedding(scaling_factor=3.0, name="turn"),
        query_norm=keras.layers.RMSNormalization(epsilon=0.5),
        key_norm=keras.layers.LayerNormalization(epsilon=0.25),
        query_scale=0.3,
        logit_soft_cap=29.0,
        name="attention",
    )
    data = keras.saving.serialize_keras_object(layer)
    copy = keras.saving.deserialize_keras_object(data)
    assert type(copy) is CachedMultiHeadAttention
    assert copy.get_config() == layer.get_config()
    assert copy.get_config()["num_key_value_heads"] == 2
    assert copy.rotary_embedding.scaling_factor == 3.0
    assert copy.key_norm.epsilon == 0.25
    x = cases.noise(B, T, cases.D)
    for each in (layer, copy):
        each.build(x.shape, x.shape)
    assert len(layer.weights) == len(copy.weights) == 8
    for seed, weight in enumerate(layer.trainable_weights):
        weight.assign(cases.noise(*weight.shape, seed=seed))
    copy.set_weights(layer.get_weights())
    outputs = [cases.compiled(lambda x, a=a: a(x, x))(x) for a in (layer, copy)]
    np.testing.assert_array_equal(*map(cases.numpy, outputs))


def test_low_rank_adapters():
    """`enable_lora` on a projection is Keras' own and works with a cache."""
    layer, x = cases.make_layer(use_bias=False), cases.noise(B, T, cases.D)
    before = outputs(layer, x)
    for dense in (layer.query_dense, layer.value_dense, layer.output_dense):
        dense.enable_lora(2)
        for seed, weight in enumerate((dense.lora_kernel_a, dense.lora_kernel_b)):
            weight.assign(cases.noise(*weight.shape, seed=seed))
    after = outputs(layer, x)
    for old, new in zip(before, after, strict=True):
        np.testing.assert_allclose(new, after[0], rtol=0, atol=1e-4)
        assert abs(new - old).max() > 0.1


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="no int8 matmul there")
def test_int8_projections():
    """`quantize` of the model around the layer; caches stay floats."""
    query = keras.Input((T, cases.D), batch_size=B)
    layer = cases.make_layer()
    model = keras.Model(query, layer(query, query))
    x = cases.noise(B, T, cases.D)
    before = outputs(layer, x)
    model.quantize("int8")
    assert layer.query_dense.dtype_policy.quantization_mode == "int8"
    for old, new in zip(before, outputs(layer, x), strict=True):
        assert 1e-5 < abs(new - old).max() < 0.05


def test_arguments_by_position():
    """In the order of Keras' own layer."""
    given = (3, 7, 5, 0.1, False, (13,), (1,), 4)
    ours = CachedMultiHeadAttention(*given)
    theirs = keras.layers.MultiHeadAttention(*given, name=ours.name)
    config = ours.get_config()
    for name, value in theirs.get_config().items():
        if name != "dtype":
            assert config[name] == value, name


@pytest.mark.jax_only
@pytest.mark.parametrize("cached", [False, True])
def test_gradients(cached):
    """Through our own attention they are those of the fused one, and finite."""
    import jax

    x = cases.noise(B, T, cases.D)
    mask = np.tri(T, dtype=bool)[None].repeat(B, 0)
    mask[1, 2] = False
    gradients = []
    for cap in (None, 1e4):  # so large a cap changes nothing
        layer = cases.make_layer(logit_soft_cap=cap)

        def loss(x, layer=layer):
            call = dict(attention_mask=mask)
            if cached:
                cache = cases.make_cache(layer, B, T, "head_major", filler=0.0)
                call.update(cache=cache, cache_update_index=0)
            output = layer(x, x, **call)
            return keras.ops.sum((output[0] if cached else output) ** 2)

        gradients.append(np.asarray(jax.jit(jax.grad(loss))(x)))
    assert np.isfinite(gradients[0]).all() and abs(gradients[0]).max() > 0.1
    np.testing.assert_allclose(gradients[0], gradients[1], rtol=0, atol=1e-4)
