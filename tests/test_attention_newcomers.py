"""The layer as newcomers meet it: other layers' names and other layers' files."""

import attention_cases as cases
import keras
import numpy as np
import pytest

from keras_kvcache.layers import CachedMultiHeadAttention
from keras_kvcache.layers.foreign_arguments import ADVICE

INSTEAD = {
    "num_query_heads": "write `num_heads`",
    "head_dim": "write `key_dim`",
    "num_kv_heads": "write `num_key_value_heads`",
    "embed_dim": "the width follows from the inputs; `key_dim` is ",
    "hidden_dim": "the width follows from the inputs; `key_dim` is ",
    "rope": "write `rotary_embedding=RotaryEmbedding(",
    "window_size": "write `sliding_window`",
    "is_causal": "write `use_causal_mask=True` in the call",
    "qk_norm": "write `query_norm` and `key_norm`",
    "num_key_value_head": "write `num_key_value_heads`",
    "use_biases": "write `use_bias`",
    "kernel_initialiser": "write `kernel_initializer`",
}


@pytest.mark.parametrize("name", INSTEAD)
def test_names_of_other_layers_are_told_what_takes_their_place(name):
    with pytest.raises(TypeError) as error:
        CachedMultiHeadAttention(6, 10, **{name: 2})
    message = str(error.value)
    assert message.startswith(
        f"`CachedMultiHeadAttention` has no argument `{name}`: {INSTEAD[name]}"
    )
    assert message.endswith(f"Received: {name}=2")


def test_the_arguments_of_keras_grouped_query_layer():
    """As they stand in its own documentation, with nothing else given."""
    with pytest.raises(TypeError, match="write `key_dim`; .*write `num_heads`"):
        CachedMultiHeadAttention(head_dim=10, num_query_heads=6, num_key_value_heads=2)


def test_what_nobody_knows_is_left_to_keras():
    with pytest.raises(ValueError, match="Unrecognized keyword arguments"):
        CachedMultiHeadAttention(6, 10, zzz=2)
    with pytest.raises(TypeError, match="missing 2 required positional"):
        CachedMultiHeadAttention()


def test_advice_is_about_names_that_do_not_exist():
    for layer in (keras.layers.MultiHeadAttention, CachedMultiHeadAttention):
        config = layer(6, 10).get_config()
        assert not set(ADVICE) & set(config)


def test_a_subclass_has_arguments_of_its_own():
    class Scaled(CachedMultiHeadAttention):
        def __init__(self, *args, scale=1.0, **kwargs):
            super().__init__(*args, **kwargs)
            self.scale = scale

    assert Scaled(6, 10, scale=2.0).scale == 2.0
    with pytest.raises(TypeError, match="write `key_dim`"):
        Scaled(6, 10, scale=2.0, head_dim=3)


def functional(make_layer, seed):
    """Two attention layers among others, the second of another size."""
    keras.utils.set_random_seed(seed)
    x = inputs = keras.Input((None, cases.D))
    for heads in (6, 4):
        x = keras.layers.Dense(cases.D, kernel_initializer="lecun_normal")(x)
        x = make_layer(heads)(x, x, use_causal_mask=True)
    return keras.Model(inputs, x)


def ours(heads):
    groups = heads // 2 if ours.grouped else None
    return CachedMultiHeadAttention(
        heads, 10, num_key_value_heads=groups, bias_initializer="normal"
    )


def multi_head(heads):
    return keras.layers.MultiHeadAttention(heads, 10, bias_initializer="normal")


def grouped_query(heads):
    return keras.layers.GroupQueryAttention(
        10, heads, heads // 2, bias_initializer="normal"
    )


@pytest.mark.parametrize("ending", [".weights.h5", ".keras"])
@pytest.mark.parametrize("theirs", [multi_head, grouped_query])
def test_a_file_of_keras_own_layers_says_how_it_comes_in(theirs, ending, tmp_path):
    ours.grouped = theirs is grouped_query
    source, model = functional(theirs, seed=1), functional(ours, seed=2)
    x = cases.noise(3, 7, cases.D)
    path = tmp_path / f"theirs{ending}"
    (source.save if ending == ".keras" else source.save_weights)(path)
    name = type(theirs(2)).__name__.replace("GroupedQuery", "GroupQuery")
    with pytest.raises(ValueError, match=rf"layers\.{name}`.*theirs\.get_weights\(\)"):
        model.load_weights(path)

    # What it says, done.
    if ending == ".keras":
        loaded = keras.saving.load_model(path)
    else:
        loaded = functional(theirs, seed=3)
        loaded.load_weights(path)
    model.set_weights(loaded.get_weights())
    expected = keras.ops.convert_to_numpy(source(x))
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(model(x)), expected, atol=1e-5
    )


@pytest.mark.parametrize("ending", [".weights.h5", ".keras"])
def test_a_file_of_our_own_layers_is_read_as_it_is(ending, tmp_path):
    ours.grouped = True
    source, model = functional(ours, seed=1), functional(ours, seed=2)
    path = tmp_path / f"ours{ending}"
    (source.save if ending == ".keras" else source.save_weights)(path)
    model.load_weights(path)
    for one, other in zip(model.get_weights(), source.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_layers_that_are_attributes_are_found_by_the_attribute(tmp_path):
    """There Keras' own file comes in without more."""

    class Model(keras.Model):
        def __init__(self, layer):
            super().__init__()
            self.attention = layer

        def call(self, x):
            return self.attention(x, x)

    x = cases.noise(2, 5, cases.D)
    source, model = Model(multi_head(6)), Model(CachedMultiHeadAttention(6, 10))
    expected = source(x)
    model(x)
    source.save_weights(tmp_path / "theirs.weights.h5")
    model.load_weights(tmp_path / "theirs.weights.h5")
    np.testing.assert_allclose(
        *map(keras.ops.convert_to_numpy, (model(x), expected)), atol=1e-5
    )
