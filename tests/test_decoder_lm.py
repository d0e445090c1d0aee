"""The model: cached against uncached, trained, saved, loaded."""

import json

import keras
import numpy as np
import pytest
from conftest import make_lm, shared_lm
from keras import ops

from keras_kvcache import DecoderLM
from keras_kvcache.layers import DecoderBlock
from keras_kvcache.models.presets import weight_name

IDS = np.random.default_rng(5).integers(0, 101, (3, 19))


def to_numpy(x):
    return ops.convert_to_numpy(x)


@pytest.mark.parametrize("layout", ["head_major", "dense"])
def test_call_with_cache_equals_call(lm, layout):
    whole = to_numpy(lm(IDS))
    cache = lm.init_cache(3, 23, layout=layout)
    first, hidden, cache = lm.call_with_cache(IDS[:, :13], cache, 0)
    assert hidden.shape == (3, 13, lm.hidden_dim)
    second, _, cache = lm.call_with_cache(IDS[:, 13:], cache, np.full(3, 13))
    cached = np.concatenate([to_numpy(first), to_numpy(second)], axis=1)
    np.testing.assert_allclose(cached, whole, atol=1e-4)


def test_caches_may_be_plain_tensors():
    lm = shared_lm()
    cache = [ops.zeros((3, 2, 23, 2, 14)) for _ in range(3)]
    logits, _, cache = lm.call_with_cache(IDS, cache, 0)
    np.testing.assert_allclose(to_numpy(logits), to_numpy(lm(IDS)), atol=1e-4)
    assert [tuple(layer.shape) for layer in cache] == [(3, 2, 23, 2, 14)] * 3


def test_what_a_cache_takes_is_known_before_it_is_made():
    lm = shared_lm()
    for layout in ("head_major", "dense"):
        spec, *_ = lm.cache_specs(2, 521, codec="bfloat16", layout=layout)
        caches = lm.init_cache(2, 521, codec="bfloat16", layout=layout)
        assert spec.nbytes == 2 * 521 * 2 * 2 * 14 * 2
        assert [cache.nbytes for cache in caches] == [spec.nbytes] * 3


def test_fit_learns_to_count():
    keras.utils.set_random_seed(2)
    lm = DecoderLM(13, 2, 2, 28, 37, max_sequence_length=29, dropout=0.1)
    lm.compile(optimizer=keras.optimizers.Adam(1e-2))
    start = np.random.default_rng(0).integers(0, 13, (64, 1))
    counting = (start + np.arange(12)) % 13
    history = lm.fit(counting[:, :-1], counting[:, 1:], epochs=30, verbose=0)
    assert history.history["loss"][-1] < 0.2 < history.history["loss"][0]
    assert lm.generate([4, 5, 6], max_new_tokens=9) == [
        *range(4, 13),
        *range(0, 3),
    ]


def test_saves_and_loads_as_keras_file(lm, tmp_path):
    lm.save(tmp_path / "lm.keras")
    loaded = keras.saving.load_model(tmp_path / "lm.keras")
    assert type(loaded) is DecoderLM
    np.testing.assert_array_equal(to_numpy(loaded(IDS)), to_numpy(lm(IDS)))
    assert loaded.get_config() == lm.get_config()


def test_saves_and_loads_as_preset(lm, tmp_path):
    lm.save_to_preset(tmp_path / "preset")
    names = sorted(path.name for path in (tmp_path / "preset").iterdir())
    assert names == ["config.json", "model.weights.h5"]
    loaded = DecoderLM.from_preset(str(tmp_path / "preset"))
    np.testing.assert_array_equal(to_numpy(loaded(IDS)), to_numpy(lm(IDS)))
    without = {"name": None}
    assert {**loaded.get_config(), **without} == {**lm.get_config(), **without}
    half = DecoderLM.from_preset(tmp_path / "preset", dtype="bfloat16")
    assert half.compute_dtype == "bfloat16"
    random = DecoderLM.from_preset(tmp_path / "preset", load_weights=False)
    assert not np.allclose(to_numpy(random(IDS)), to_numpy(lm(IDS)))


def test_damaged_presets_are_refused(tmp_path):
    folder = tmp_path / "preset"
    make_lm(num_layers=1).save_to_preset(folder)
    with pytest.raises(FileNotFoundError, match="config.json"):
        DecoderLM.from_preset(tmp_path)
    weights = (folder / "model.weights.h5").read_bytes()
    (folder / "model.weights.h5").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match="model.weights.h5"):
        DecoderLM.from_preset(folder)
    (folder / "model.weights.h5").unlink()
    with pytest.raises(FileNotFoundError, match="model.weights.h5"):
        DecoderLM.from_preset(folder)
    (folder / "model.weights.h5").write_bytes(weights)
    described = json.loads((folder / "config.json").read_text())
    described["format_version"] = 99
    (folder / "config.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match="format version 1. Received: 99"):
        DecoderLM.from_preset(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="must be JSON"):
        DecoderLM.from_preset(folder)
    for config in (5, {}, {"swing": 1}):
        described.update(format_version=1, config=config)
        (folder / "config.json").write_text(json.dumps(described))
        with pytest.raises(ValueError, match="config.json must"):
            DecoderLM.from_preset(folder)


def test_a_failed_save_leaves_the_earlier_preset(tmp_path, monkeypatch):
    folder = tmp_path / "preset"
    make_lm(num_layers=1).save_to_preset(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(TypeError):
        make_lm(num_layers=2, activation=lambda x: x).save_to_preset(folder)
    other = make_lm(num_layers=2)
    monkeypatch.setattr(other, "save_weights", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        other.save_to_preset(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["preset"]


def test_a_tokenizer_of_an_earlier_preset_does_not_stay(tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text("{}")
    make_lm(num_layers=1).save_to_preset(tmp_path)
    assert DecoderLM.from_preset(tmp_path).tokenizer is None


def test_a_compiled_model_is_compiled_when_loaded(tmp_path):
    lm = make_lm(num_layers=1)
    lm.compile(optimizer=keras.optimizers.Adam(0.25))
    lm.save(tmp_path / "lm.keras")
    loaded = keras.saving.load_model(tmp_path / "lm.keras")
    assert float(loaded.optimizer.learning_rate.value) == 0.25


def test_learned_positions_end_with_an_error():
    lm = make_lm("gpt2", max_sequence_length=17)
    with pytest.raises(ValueError, match="=17. Received: 19 tokens from 0 on"):
        lm(IDS)
    with pytest.raises(ValueError, match="5 tokens from 13 on"):
        lm.call_with_cache(IDS[:, :5], lm.init_cache(3, 29), 13)


@pytest.mark.parametrize(
    "preset, error, message",
    [
        ("gpt5_huge", ValueError, "smollm2_135m_instruct.*'gpt5_huge'"),
        ("missing.gguf", FileNotFoundError, "missing.gguf"),
        (7, TypeError, "`preset` must be a name or a path. Received: int"),
    ],
)
def test_unknown_presets_are_refused(preset, error, message):
    with pytest.raises(error, match=message):
        DecoderLM.from_preset(preset)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(num_layers=0), "`num_layers` must be a positive integer. Received: 0"),
        (dict(vocabulary_size=1.5), "`vocabulary_size`"),
        (dict(num_key_value_heads=4), "multiple of `num_key_value_heads`.*=6.*=4"),
        (dict(normalization="batch"), "`normalization` must be one of.*'batch'"),
        (dict(position_embedding="alibi"), "`position_embedding`.*'alibi'"),
        (dict(dropout=1.0), "`dropout` must be from 0 to below 1"),
        (dict(activation="swoosh"), "swoosh"),
        (dict(sliding_window=0), "`sliding_window`"),
        (dict(dropout="a"), "`dropout`"),
        (dict(layer_norm_epsilon="a"), "`layer_norm_epsilon`"),
        (dict(rope_max_wavelength="a"), "`max_wavelength`"),
        (dict(head_dim=None, hidden_dim=47), "`hidden_dim`"),
        (dict(embedding_scale=0), "`embedding_scale`.*Received: 0"),
        (dict(query_scale=-1.0), "`query_scale`.*Received: -1.0"),
        (dict(query_key_norm_epsilon=0), "`query_key_norm_epsilon`"),
        (dict(final_norm_epsilon="a"), "`final_norm_epsilon`"),
        (dict(sliding_window_pattern=2), "`sliding_window_pattern`.*=2.*=None"),
        (dict(rope_local_max_wavelength=9), "`rope_local_max_wavelength`.*=None"),
        (dict(sliding_window=5, sliding_window_pattern=0), "`sliding_window_pattern`"),
        (dict(num_experts=2, num_experts_per_token=3), "=3, num_experts=2"),
        (dict(num_experts=2, use_bias=True), "`num_experts`.*use_bias=True"),
    ],
)
def test_bad_configurations_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_lm(**options)


EVERYTHING = dict(
    num_layers=4,
    normalization="unit_offset_rms_norm",
    attention_bias=True,
    query_scale=0.3,
    query_key_norm=True,
    query_key_norm_epsilon=1e-3,
    final_norm_epsilon=1e-2,
    use_post_attention_norm=True,
    use_post_ffw_norm=True,
    num_experts=3,
    num_experts_per_token=2,
    embedding_scale=1.7,
    sliding_window=5,
    sliding_window_pattern=2,
    rope_max_wavelength=300.0,
    rope_local_max_wavelength=20.0,
    rope_local_position_scaling_factor=1.5,
    attention_logit_soft_cap=3.0,
    final_logit_soft_cap=5.0,
)


def test_all_that_families_have(tmp_path):
    """At once: cached equals uncached, a saved model equals itself."""
    lm = make_lm(**EVERYTHING)
    assert [block.sliding_window for block in lm.blocks] == [5, None, 5, None]
    wavelengths = [block.rotary_embedding.max_wavelength for block in lm.blocks]
    assert wavelengths == [20.0, 300.0, 20.0, 300.0]
    whole = to_numpy(lm(IDS))
    cache = lm.init_cache(3, 23)
    first, _, cache = lm.call_with_cache(IDS[:, :13], cache, 0)
    second, _, cache = lm.call_with_cache(IDS[:, 13:], cache, 13)
    cached = np.concatenate([to_numpy(first), to_numpy(second)], axis=1)
    np.testing.assert_allclose(cached, whole, atol=1e-4)
    lm.save_to_preset(tmp_path)
    loaded = DecoderLM.from_preset(tmp_path)
    np.testing.assert_array_equal(to_numpy(loaded(IDS)), whole)


@pytest.mark.parametrize(
    "option, value",
    [
        ("attention_bias", True),
        ("query_scale", 0.3),
        ("query_key_norm", True),
        ("use_post_attention_norm", True),
        ("use_post_ffw_norm", True),
        ("embedding_scale", 1.7),
        ("final_norm_epsilon", 1.0),
        ("rope_local_max_wavelength", 20.0),
        ("sliding_window_pattern", 1),
    ],
)
def test_every_option_changes_the_numbers(option, value):
    plain = make_lm("windowed", num_layers=1, sliding_window=5)
    changed = make_lm("windowed", num_layers=1, sliding_window=5, **{option: value})
    values = {weight_name(weight): weight for weight in plain.weights}
    for weight in changed.weights:
        name = weight_name(weight)
        weight.assign(values[name] if name in values else np.ones(weight.shape))
    assert abs(to_numpy(changed(IDS)) - to_numpy(plain(IDS))).max() > 1e-3


def test_bad_caches_are_refused():
    lm = shared_lm()
    with pytest.raises(ValueError, match="one cache a layer.*3. Received: 2"):
        lm.call_with_cache(IDS, lm.init_cache(3, 23)[:2], 0)
    with pytest.raises(ValueError, match="batch size B = 3.*Received: 2"):
        lm.call_with_cache(IDS, lm.init_cache(2, 23), 0)
    with pytest.raises(ValueError, match="index=7, T=19, S=23"):
        lm.call_with_cache(IDS, lm.init_cache(3, 23), 7)


def test_blocks_are_public_layers():
    block = DecoderBlock(2, 11, head_dim=6)
    assert block(np.ones((1, 3, 7), "float32")).shape == (1, 3, 7)
