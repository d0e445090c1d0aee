"""The config of a decoder: what it was, and layers that differ."""

import json
from dataclasses import FrozenInstanceError, replace

import keras
import numpy as np
import pytest
from conftest import make_lm
from keras import ops

from keras_kvcache import DecoderLM, EncoderDecoderLM
from keras_kvcache.caches import CacheSpec, Rolling, Static
from keras_kvcache.layers import CachedMultiHeadAttention, DecoderBlock, decoder_block
from keras_kvcache.models import DecoderConfig, LayerConfig, RopeConfig
from keras_kvcache.models.encoder_decoder_config import EncoderDecoderConfig

IDS = np.random.default_rng(5).integers(0, 101, (3, 19))

# As models wrote it before there was a `DecoderConfig`, letter by letter.
WRITTEN = """{
  "name": "lm", "trainable": true,
  "dtype": {"module": "keras", "class_name": "DTypePolicy",
    "config": {"name": "float32"}, "registered_name": null},
  "vocabulary_size": 101, "num_layers": 4, "num_query_heads": 6, "hidden_dim": 42,
  "intermediate_dim": 59, "num_key_value_heads": 2, "head_dim": 14,
  "max_sequence_length": 613, "normalization": "rms_norm",
  "layer_norm_epsilon": 1e-05, "activation": "silu", "gated_feedforward": true,
  "use_bias": false, "attention_bias": true, "query_scale": 0.3,
  "query_key_norm": true, "query_key_norm_epsilon": 1e-05,
  "use_post_attention_norm": false, "use_post_ffw_norm": false, "num_experts": null,
  "num_experts_per_token": null, "final_norm_epsilon": 0.001,
  "position_embedding": "rotary", "rope_max_wavelength": 300.0,
  "rope_position_scaling_factor": 2.0,
  "rope_frequency_factors": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], "rotary_dim": null,
  "rope_local_max_wavelength": 20.0, "rope_local_position_scaling_factor": 1.0,
  "embedding_scale": 1.7, "tie_word_embeddings": false, "sliding_window": 5,
  "sliding_window_pattern": 2, "attention_logit_soft_cap": 3.0,
  "final_logit_soft_cap": 5.0, "dropout": 0.0,
  "kernel_initializer": {"module": "keras.initializers",
    "class_name": "RandomNormal",
    "config": {"seed": null, "mean": 0.0, "stddev": 0.02}, "registered_name": null}
}"""


def logits(model, ids=IDS):
    return ops.convert_to_numpy(model(ids))


def cached_logits(model, **options):
    """In two pieces, the second one token by token."""
    cache, pieces = model.init_cache(3, 23, **options), []
    for first, end in ((0, 13), *((i, i + 1) for i in range(13, 19))):
        piece, _, cache = model.call_with_cache(IDS[:, first:end], cache, first)
        pieces.append(ops.convert_to_numpy(piece))
    return np.concatenate(pieces, axis=1)


def test_a_config_of_before_is_read_and_written_as_it_was():
    written = json.loads(WRITTEN)
    lm = DecoderLM.from_config(written)
    described = json.loads(json.dumps(lm.get_config()))
    assert described == {**written, "dtype": described["dtype"]}
    local, every = lm.config.layers[0], lm.config.layers[1]
    assert (local.sliding_window, every.sliding_window) == (5, None)
    assert local.rope == RopeConfig(20.0)
    assert every.rope == RopeConfig(300.0, 2.0, None, tuple(range(1, 8)))
    assert lm.config.layers == (local, every) * 2
    assert (every.head_dim, every.logit_soft_cap, every.use_bias) == (14, 3.0, False)
    assert lm.hidden_dim == 42 and lm.blocks[0].query_scale == 0.3


def test_a_preset_of_before_is_loaded(tmp_path):
    lm = DecoderLM.from_config(json.loads(WRITTEN))
    lm.save_weights(tmp_path / "model.weights.h5")
    described = {"format_version": 1, "config": json.loads(WRITTEN)}
    (tmp_path / "config.json").write_text(json.dumps(described))
    np.testing.assert_array_equal(logits(DecoderLM.from_preset(tmp_path)), logits(lm))


def test_fields_are_shown_and_can_not_be_set():
    """Set they would change nothing: the layers are made."""
    lm = make_lm()
    sound = keras.Input((None, 7), name="encoder_sound")
    encoder = keras.Model({"encoder_sound": sound}, keras.layers.Dense(5)(sound))
    paired = EncoderDecoderLM(encoder, 101, 1, 3, 21, 13)
    for shown, name in (
        (lm, "hidden_dim"),
        (lm.blocks[0], "dropout"),
        (paired, "dropout"),
    ):
        assert getattr(shown, name) == getattr(shown.config, name)
        words = f"`{name}`.*constructor.*{type(shown).__name__}.*=31"
        with pytest.raises(AttributeError, match=words):
            setattr(shown, name, 31)


def test_scores_in_configs():
    """Written only where they are asked for; layers may differ in them."""
    names = {"score_bias", "use_sink_logits"}
    lm = make_lm(num_layers=2)
    assert not names & lm.get_config().keys()
    assert not names & lm.blocks[0].get_config().keys()
    options = [{}, {"score_bias": None, "use_sink_logits": True}]
    lm = make_lm(num_layers=2, score_bias=7, layer_options=options)
    first, second = (block.attention for block in lm.blocks)
    assert first.score_bias_table.shape == (6, 7) and first.sink_logits is None
    assert second.score_bias_table is None and second.sink_logits.shape == (6,)
    again = DecoderLM.from_config(json.loads(json.dumps(lm.get_config())))
    assert again.config == lm.config


@keras.saving.register_keras_serializable(package="test_config")
def leaning(query, slot):
    return -0.5 * ops.cast(query - slot, "float32")


@pytest.mark.parametrize("bias", [leaning, "alibi"], ids=["function", "alibi"])
def test_a_bias_without_weights_is_saved(tmp_path, bias):
    lm = make_lm(num_layers=2, layer_options=[{"score_bias": bias}, {}])
    assert np.abs(logits(lm) - logits(make_lm(num_layers=2))).max() > 0.01
    lm.save(tmp_path / "lm.keras")
    lm.save_to_preset(tmp_path / "preset")
    for loaded in (
        keras.saving.load_model(tmp_path / "lm.keras"),
        DecoderLM.from_preset(tmp_path / "preset"),
    ):
        assert loaded.config.layers[0].score_bias == bias
        np.testing.assert_array_equal(logits(loaded), logits(lm))


def test_a_config_does_not_change():
    config = DecoderConfig(101, 2, 6, 42, 59, 2)
    with pytest.raises(FrozenInstanceError):
        config.hidden_dim = 43
    with pytest.raises(FrozenInstanceError):
        config.layers[0].head_dim = 43
    changed = replace(config, sliding_window=5)
    assert [layer.sliding_window for layer in changed.layers] == [5, 5]
    assert [layer.sliding_window for layer in config.layers] == [None, None]


LAYERS = [
    {},
    {"num_query_heads": 4, "num_key_value_heads": 4, "head_dim": 22},
    {"num_key_value_heads": 1, "sliding_window": 7, "rope": None},
    {
        "num_experts": 3,
        "normalization": "unit_offset_rms_norm",
        "rope": {"max_wavelength": 100.0, "rotary_dim": 6},
        "intermediate_dim": 31,
    },
]


def make_varied(**options):
    return make_lm(num_layers=4, layer_options=LAYERS, **options)


def test_layers_that_differ_say_their_own_caches():
    specs = make_varied().cache_specs(3, 23, codec="bfloat16", layout="dense")
    common = dict(codec="bfloat16", layout="dense")
    assert specs == (
        CacheSpec(3, 23, 2, 14, **common),
        CacheSpec(3, 23, 4, 22, **common),
        CacheSpec(3, 23, 1, 14, **common, kind=Rolling(7)),
        CacheSpec(3, 23, 2, 14, **common),
    )
    total = make_varied().cache_bytes(3, 23, codec="bfloat16", layout="dense")
    assert total.total == sum(spec.nbytes for spec in specs)


@pytest.mark.parametrize("options", [{}, {"kind": "static"}, {"layout": "dense"}])
def test_layers_that_differ_decode_as_they_compute(options):
    lm = make_varied()
    expected = logits(lm)
    np.testing.assert_allclose(cached_logits(lm, **options), expected, atol=1e-4)
    row = lm.generate([3, 1, 4], max_new_tokens=29)
    likeliest = logits(lm, np.array([row]))[0].argmax(-1)
    assert row[3:] == likeliest[2:-1].tolist() and len(set(row)) > 8


def test_each_option_of_a_layer_counts():
    """Against blocks that are made by themselves, of the same weights."""
    lm = make_varied()
    x = np.random.default_rng(2).normal(size=(3, 19, lm.hidden_dim)).astype("float32")
    for options, block in zip(LAYERS, lm.blocks, strict=True):
        alone = dict(lm.blocks[0].get_config(), name="alone")
        rope = options.get("rope", {"max_wavelength": 10000.0})
        alone |= {name: options[name] for name in options.keys() - {"rope"}}
        alone = DecoderBlock.from_config(alone)
        if rope is None:
            alone.rotary_embedding = None
        else:
            alone.rotary_embedding = type(lm.blocks[0].rotary_embedding)(**rope)
        alone.build(x.shape)
        alone.set_weights(block.get_weights())
        np.testing.assert_array_equal(
            ops.convert_to_numpy(block(x)), ops.convert_to_numpy(alone(x))
        )


def test_layers_that_differ_are_saved(tmp_path):
    lm = make_varied()
    lm.save(tmp_path / "lm.keras")
    lm.save_to_preset(tmp_path / "preset")
    for loaded in (
        keras.saving.load_model(tmp_path / "lm.keras"),
        DecoderLM.from_preset(tmp_path / "preset"),
    ):
        assert loaded.config == lm.config
        np.testing.assert_array_equal(logits(loaded), logits(lm))


def test_sizes_of_numpy_are_saved(tmp_path):
    sizes = dict(intermediate_dim=41, num_key_value_heads=3, head_dim=14)
    lm = make_lm(**{name: np.int64(size) for name, size in sizes.items()})
    lm.save_to_preset(tmp_path)
    assert DecoderLM.from_preset(tmp_path).config == lm.config


def test_what_follows_from_a_layers_option_is_the_layers():
    first, second = make_lm(
        num_layers=2,
        layer_options=[{}, {"use_bias": True, "layer_norm_epsilon": 1e-3}],
    ).config.layers
    assert (first.attention_bias, first.query_key_norm_epsilon) == (False, 1e-5)
    assert (second.attention_bias, second.query_key_norm_epsilon) == (True, 1e-3)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(num_query_heads=0), "`num_query_heads`.*Received: 0"),
        (dict(hidden_dim=50), "multiple of `num_query_heads`.*=50.*=6"),
        (dict(max_sequence_length=-3), "`max_sequence_length`.*Received: -3"),
    ],
)
def test_bad_sizes_of_encoder_decoders_are_refused(options, message):
    sizes = dict(vocabulary_size=101, num_layers=1, num_query_heads=6, hidden_dim=48)
    with pytest.raises(ValueError, match=message):
        EncoderDecoderConfig(**{**sizes, "intermediate_dim": 59, **options})


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(layer_options=[{}] * 2), "one dictionary a layer, 3. Received: 2"),
        (dict(layer_options=[{}, {"swing": 1}, {}]), "Received: {'swing': 1}"),
        (dict(layer_options=[{}, {"rope": {"swing": 1}}, {}]), "`rope`.*{'swing': 1}"),
        (dict(layer_options=[{}, {"rope": 3}, {}]), "`rope` must have.*Received: 3"),
        (dict(layer_options=[{}, {}, {"head_dim": 0}]), "`head_dim`.*Received: 0"),
        (dict(layer_options=[{"num_key_value_heads": 4}] * 3), "multiple of.*=6.*=4"),
        (dict(attention_kind="latent"), "`attention_kind`.*multi_head.*'latent'"),
        (dict(position_embedding="learned", has_last_position=False), "`has_last_pos"),
    ],
)
def test_bad_layers_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_lm(**options)


def test_rotations_may_have_an_end(tmp_path):
    lm = make_lm("windowed", has_last_position=True, max_sequence_length=17)
    lm.save_to_preset(tmp_path)
    for model in (lm, DecoderLM.from_preset(tmp_path)):
        assert model.has_last_position and not model.is_endless()
        with pytest.raises(ValueError, match="=17. Received: 19 tokens from 0 on"):
            model(IDS)
    assert make_lm("windowed", max_sequence_length=17).is_endless()


class NarrowAttention(CachedMultiHeadAttention):
    """A kind whose caches have keys of another size than its values."""

    def __init__(self, num_heads, key_dim, **options):
        super().__init__(num_heads, key_dim - 4, value_dim=key_dim, **options)


def test_another_kind_of_attention_brings_its_own_cache(monkeypatch):
    monkeypatch.setitem(decoder_block.ATTENTION_KINDS, "narrow", NarrowAttention)
    options = [{}, {"attention_kind": "narrow"}, {}]
    lm = make_lm(layer_options=options)
    assert [type(block.attention) is NarrowAttention for block in lm.blocks] == [
        False,
        True,
        False,
    ]
    specs = lm.cache_specs(3, 23)
    assert [(spec.head_dim, spec.value_dim) for spec in specs] == [
        (14, None),
        (10, 14),
        (14, None),
    ]
    np.testing.assert_allclose(cached_logits(lm), logits(lm), atol=1e-4)


def test_a_layer_of_its_own_says_its_cache():
    layer = CachedMultiHeadAttention(
        6, 14, num_key_value_heads=2, value_dim=10, sliding_window=7, dtype="bfloat16"
    )
    spec = layer.cache_spec(3, 23)
    assert spec == CacheSpec(3, 23, 2, 14, 10, codec="bfloat16", kind=Rolling(7))
    assert layer.cache_spec(3, 7).kind == Static()
    dense = layer.cache_spec(3, 23, "float16", "static", "dense")
    expected = CacheSpec(3, 23, 2, 14, 10, codec="float16", layout="dense")
    assert dense == expected
    with pytest.raises(ValueError, match="`kind`.*'mobile'"):
        layer.cache_spec(3, 23, kind="mobile")


def test_layers_hold_what_a_block_is_made_of():
    layer = DecoderConfig(101, 1, 6, 42, 59).layers[0]
    assert isinstance(layer, LayerConfig) and layer.num_key_value_heads == 6
    assert layer.head_dim == 7
