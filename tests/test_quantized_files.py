"""What is saved of quantized models can be read, and answers as before."""

import copy
import functools

import keras
import numpy as np
import pytest
from conftest import make_lm
from keras import ops

from keras_kvcache import DecoderLM, EncoderDecoderLM
from keras_kvcache.layers import CachedMultiHeadAttention, DecoderBlock

IDS = np.random.default_rng(3).integers(0, 101, (3, 17)).astype("int32")
INPUTS = np.random.default_rng(5).normal(size=(3, 7, 14)).astype("float32")
Int4 = keras.quantizers.Int4QuantizationConfig
Int8 = keras.quantizers.Int8QuantizationConfig
WAYS_TO_QUANTIZE = {
    "int8": dict(mode="int8"),
    "int4": dict(mode="int4"),
    "float8": dict(mode="float8"),
    "int4 in groups of 8": dict(config=Int4(block_size=8)),
    "int8 weights only": dict(config=Int8(activation_quantizer=None)),
    "attention only": dict(mode="int8", filters="query|value"),
}

pytestmark = pytest.mark.filterwarnings("ignore:.*quantize.*|Skipping variable")


def answer(model, inputs=IDS):
    return ops.convert_to_numpy(model(inputs))


def by_keras(model, folder, make):
    model.save(folder / "model.keras")
    return keras.saving.load_model(folder / "model.keras")


def by_weights(model, folder, make):
    """Into a model that nobody has quantized."""
    model.save_weights(folder / "model.weights.h5")
    other = make()
    other.load_weights(folder / "model.weights.h5")
    return other


def by_preset(model, folder, make):
    model.save_to_preset(folder / "preset")
    return DecoderLM.from_preset(folder / "preset")


def by_copy(model, folder, make):
    return copy.deepcopy(model)


def kinds(model):
    """The weights' names within their layers, whatever these are called, and dtypes."""
    return sorted((weight.name, str(weight.dtype)) for weight in model.weights)


def make(**options):
    """Of these widths groups of 8 have a rest."""
    return make_lm(num_layers=2, intermediate_dim=37, **options)


@functools.cache
def quantized(how):
    """A model for tests that leave it as it is, and its answer."""
    lm = make()
    lm.quantize(**WAYS_TO_QUANTIZE[how])
    return lm, answer(lm)


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(how, marks=[pytest.mark.slow] * (how != "int8"))
        for how in WAYS_TO_QUANTIZE
    ],
)
@pytest.mark.parametrize("way", [by_keras, by_weights, by_preset, by_copy])
def test_a_quantized_model(how, way, tmp_path):
    lm, expected = quantized(how)
    loaded = way(lm, tmp_path, make)
    assert kinds(loaded) == kinds(lm)
    np.testing.assert_array_equal(answer(loaded), expected)


@pytest.mark.parametrize("how", [how for how in WAYS_TO_QUANTIZE if how != "float8"])
def test_quantizing_changes_answers(how):
    assert not np.array_equal(quantized(how)[1], answer(make()))


@pytest.mark.slow
def test_a_compiled_one_trains_on(tmp_path):
    lm = make()
    lm.quantize("int8")
    lm.compile(optimizer=keras.optimizers.SGD(0.1, momentum=0.9))
    lm.fit(IDS[:, :-1], IDS[:, 1:], verbose=0)
    loaded = by_keras(lm, tmp_path, make)
    np.testing.assert_array_equal(answer(loaded), answer(lm))
    for one, other in zip(
        lm.optimizer.variables, loaded.optimizer.variables, strict=True
    ):
        np.testing.assert_array_equal(
            ops.convert_to_numpy(one), ops.convert_to_numpy(other)
        )


@pytest.mark.slow
def test_a_preset_in_another_dtype(tmp_path):
    lm = make()
    lm.quantize("int8")
    lm.save_to_preset(tmp_path)
    loaded = DecoderLM.from_preset(tmp_path, dtype="mixed_bfloat16")
    assert loaded.compute_dtype == "bfloat16"
    assert loaded.blocks[0].attention.query_dense._kernel.dtype == "int8"
    other = make(dtype="mixed_bfloat16")
    other.quantize("int8")
    np.testing.assert_array_equal(answer(loaded), answer(other))


@pytest.mark.slow
def test_lora_and_frozen_parts(tmp_path):
    lm = make()
    lm.quantize("int8")
    lm.blocks[0].trainable = False
    lm.blocks[1].attention.query_dense.enable_lora(3)
    expected = answer(lm)
    for way in (by_keras, by_preset, by_weights):
        # What LoRA added is merged in, and quantized anew.
        np.testing.assert_allclose(
            answer(way(lm, tmp_path, make)), expected, rtol=0, atol=1e-5
        )


@pytest.mark.slow
def test_experts(tmp_path):
    def make():
        return make_lm(num_layers=1, num_experts=3, num_experts_per_token=2)

    lm = make()
    lm.quantize("int8")
    assert lm.blocks[0].feedforward.router.quantization_mode == "int8"
    for way in (by_keras, by_preset, by_weights):
        np.testing.assert_array_equal(answer(way(lm, tmp_path, make)), answer(lm))


LAYERS = {
    "attention": lambda: CachedMultiHeadAttention(2, 7, use_gate=True),
    "grouped": lambda: CachedMultiHeadAttention(
        6, 5, num_key_value_heads=2, query_norm=keras.layers.RMSNormalization()
    ),
    "block": lambda: DecoderBlock(2, 13),
    "experts": lambda: DecoderBlock(2, 13, num_experts=3, query_key_norm=True),
}


@pytest.mark.parametrize(
    "mode",
    ["int8", *(pytest.param(m, marks=pytest.mark.slow) for m in ("int4", "float8"))],
)
@pytest.mark.parametrize("kind", LAYERS)
def test_functional_models(kind, mode, tmp_path):
    inputs = keras.Input((7, 14))
    layer = LAYERS[kind]()
    hidden = layer(inputs) if "b" in kind or "x" in kind else layer(inputs, inputs)
    model = keras.Model(inputs, keras.layers.Dense(3)(hidden))
    model.quantize(mode)
    loaded = by_keras(model, tmp_path, None)
    assert kinds(loaded) == kinds(model)
    expected = answer(model, INPUTS)
    np.testing.assert_array_equal(answer(loaded, INPUTS), expected)
    clone = keras.models.clone_model(model)
    model.save_weights(tmp_path / "model.weights.h5")
    clone.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(answer(clone, INPUTS), expected)


@pytest.mark.slow
def test_an_encoder_of_keras_layers(tmp_path):
    ids = keras.Input((None,), dtype="int32", name="encoder_token_ids")
    embedded = keras.layers.Embedding(101, 14)(ids)
    attended = keras.layers.MultiHeadAttention(2, 7)(embedded, embedded)
    encoder = keras.Model({"encoder_token_ids": ids}, keras.layers.Dense(14)(attended))
    lm = EncoderDecoderLM(encoder, 101, 1, 2, 14, 13, max_sequence_length=29)
    lm.quantize("int8")
    inputs = {"encoder_token_ids": IDS[:, :11], "decoder_token_ids": IDS[:, 11:]}
    loaded = by_keras(lm, tmp_path, None)
    np.testing.assert_array_equal(answer(loaded, inputs), answer(lm, inputs))


def test_models_that_are_not_quantized_are_written_as_ever(tmp_path):
    lm = make()
    assert "quantization" not in lm.get_config()
    lm.save_weights(tmp_path / "lm.weights.h5")
    assert b"quantization" not in (tmp_path / "lm.weights.h5").read_bytes()
