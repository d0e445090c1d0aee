"""Configs of Hugging Face models: what they say in either style, what is refused."""

import json

import pytest

from keras_kvcache import DecoderLM
from keras_kvcache.loaders import read_hugging_face

LLAMA = dict(
    model_type="llama",
    vocab_size=101,
    hidden_size=84,
    intermediate_size=59,
    num_hidden_layers=4,
    num_attention_heads=6,
    max_position_embeddings=613,
)
# By family: what it takes beside Llama's keys.
OTHERS = {
    "mistral": {},
    "mixtral": {},
    "qwen2": {},
    "qwen3": {},
    "phi3": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "opt": dict(ffn_dim=59),
    "gpt2": dict(n_embd=84, n_head=6, n_layer=4, n_positions=113),
}
SLIDING, FULL = "sliding_attention", "full_attention"


@pytest.fixture
def read(tmp_path):
    """A config's values to the decoder's arguments; `...` takes a key away."""

    def read(family="llama", **changes):
        values = {**LLAMA, "num_key_value_heads": 2, **OTHERS.get(family, {})}
        values |= {"model_type": family, **changes}
        values = {key: value for key, value in values.items() if value is not ...}
        (tmp_path / "config.json").write_text(json.dumps(values))
        return read_hugging_face(tmp_path, load_weights=False).config

    return read


LLAMA3 = dict(
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=31,
)


@pytest.mark.parametrize(
    "older, newer",
    [
        (dict(rope_theta=503), dict(rope_theta=503)),
        (
            dict(rope_theta=503, rope_scaling=dict(type="linear", factor=2.5)),
            dict(rope_theta=503, rope_type="linear", factor=2.5),
        ),
        (
            dict(rope_theta=503, rope_scaling=dict(LLAMA3, rope_type="llama3")),
            dict(LLAMA3, rope_theta=503, rope_type="llama3"),
        ),
        (dict(rope_scaling=None), dict(rope_type="default")),
    ],
)
def test_both_styles_of_rotation_say_the_same(read, older, newer):
    config = read(**older)
    assert config == read(rope_parameters=newer)
    assert config["rope_max_wavelength"] == older.get("rope_theta", 10000)
    assert config["rope_position_scaling_factor"] == newer.get("factor", 1.0) or (
        len(config["rope_frequency_factors"]) == 7
    )


def test_both_styles_of_gemma_3_say_the_same(read):
    scaled = dict(rope_type="linear", factor=8.0)
    older = read(
        "gemma3_text",
        rope_theta=5003.0,
        rope_local_base_freq=503.0,
        rope_scaling=scaled,
        sliding_window_pattern=3,
        sliding_window=13,
    )
    newer = read(
        "gemma3_text",
        rope_parameters={
            FULL: dict(scaled, rope_theta=5003.0),
            SLIDING: dict(rope_type="default", rope_theta=503.0),
        },
        layer_types=[SLIDING, SLIDING, FULL, SLIDING],
        sliding_window=13,
    )
    assert older == newer
    assert newer["rope_max_wavelength"] == 5003.0
    assert newer["rope_position_scaling_factor"] == 8.0
    assert newer["rope_local_max_wavelength"] == 503.0
    assert newer["sliding_window_pattern"] == 3
    default = read("gemma3_text")
    assert default["rope_max_wavelength"] == 1_000_000.0
    assert default["rope_local_max_wavelength"] == 10_000.0
    assert default["sliding_window_pattern"] is None  # fewer layers than six
    assert "rope_local_max_wavelength" not in read(
        "gemma3_text", layer_types=4 * [FULL]
    )


@pytest.mark.parametrize(
    "model_type, changes, expected",
    [
        ("llama", dict(num_key_value_heads=...), dict(num_key_value_heads=6)),
        ("llama", dict(head_dim=None), dict(head_dim=14)),
        ("llama", {}, dict(layer_norm_epsilon=1e-6, tie_word_embeddings=False)),
        ("mistral", {}, dict(sliding_window=4096)),
        ("mistral", dict(sliding_window=None), dict(sliding_window=None)),
        ("mixtral", {}, dict(sliding_window=None, rope_max_wavelength=1e6)),
        ("mixtral", {}, dict(layer_norm_epsilon=1e-5, num_experts=8)),
        ("qwen2", dict(sliding_window=13), dict(sliding_window=None)),
        ("qwen2", dict(use_sliding_window=True), dict(sliding_window=None)),
        (
            "qwen2",
            dict(use_sliding_window=True, max_window_layers=0, sliding_window=13),
            dict(sliding_window=13, sliding_window_pattern=None, attention_bias=True),
        ),
        ("qwen3", {}, dict(head_dim=128, query_key_norm=True)),
        ("phi3", dict(partial_rotary_factor=0.6), dict(rotary_dim=8)),
        ("gemma", dict(hidden_act="gelu"), dict(activation="gelu_tanh")),
        ("gemma", {}, dict(head_dim=256, tie_word_embeddings=True)),
        (
            "gemma2",
            {},
            dict(
                sliding_window_pattern=2,
                sliding_window=4096,
                attention_logit_soft_cap=50.0,
                final_logit_soft_cap=30.0,
                query_scale=1 / 16,
            ),
        ),
        (
            "gemma2",
            dict(attn_logit_softcapping=None, final_logit_softcapping=None),
            dict(attention_logit_soft_cap=None, final_logit_soft_cap=None),
        ),
        ("gemma3_text", {}, dict(final_logit_soft_cap=None, query_key_norm=True)),
        ("gpt2", {}, dict(intermediate_dim=4 * 84, activation="gelu_tanh")),
        ("opt", {}, dict(activation="relu", layer_norm_epsilon=1e-5)),
    ],
)
def test_what_a_config_leaves_out(read, model_type, changes, expected):
    config = read(model_type, **changes)
    assert {key: config[key] for key in expected} == expected


def rope(**values):
    return dict(rope_parameters=values)


@pytest.mark.parametrize(
    "model_type, changes, message",
    [
        ("smollm3", {}, "`model_type` must be one of .*llama, .*'smollm3'"),
        ("llama", dict(model_type=["llama"]), "`model_type` must be one of"),
        ("llama", dict(hidden_size=...), "`hidden_size` must be given. Received: none"),
        ("llama", dict(hidden_size=True), "`hidden_size`.*positive integer.*True"),
        ("llama", dict(hidden_size=83), "`hidden_size` must be a multiple of.*83"),
        ("llama", dict(num_key_value_heads=4), "`num_attention_heads`.*6 and 4"),
        ("llama", dict(rms_norm_eps="x"), "`rms_norm_eps`.*positive.*'x'"),
        ("llama", dict(attention_bias=1), "`attention_bias` must be true or false"),
        ("llama", dict(hidden_act="quick_gelu"), "`hidden_act`.*'quick_gelu'"),
        (
            "llama",
            dict(architectures=["LlamaForSequenceClassification"]),
            "`architectures`.*LlamaForSequenceClassification",
        ),
        (
            "llama",
            dict(quantization_config=dict(quant_method="gptq")),
            "`quantization_config` must be absent.*gptq",
        ),
        ("llama", dict(rope_interleaved=True), "`rope_interleaved`.*True"),
        ("qwen2", dict(is_causal=False), "`is_causal` must be True.*False"),
        ("llama", dict(sliding_window=7), "`sliding_window` must be absent"),
        (
            "llama",
            dict(rope_scaling=dict(rope_type="yarn", factor=4.0)),
            "`rope_scaling.rope_type` must be one of default, linear, llama3.*'yarn'",
        ),
        ("llama", dict(rope_scaling=5), "`rope_scaling` must be an object"),
        ("llama", rope(rope_type="linear"), "`rope_parameters.factor` must be given"),
        (
            "llama",
            rope(rope_type="llama3", factor=2.0),
            "`rope_parameters.low_freq_factor` must be given",
        ),
        (
            "llama",
            rope(partial_rotary_factor=0.5),
            "`rope_parameters.partial_rotary_factor` must be 1.0. Received: 0.5",
        ),
        ("llama", rope(full_attention={}), "`rope_parameters.full_attention`.*alike"),
        ("mistral", dict(layer_types=2 * [SLIDING, FULL]), "`layer_types` must be"),
        ("mistral", dict(sliding_window=0), "`sliding_window`.*Received: 0"),
        (
            "qwen2",
            dict(use_sliding_window=True, max_window_layers=2),
            "`max_window_layers` must give a window to all .*Received: 2",
        ),
        (
            "qwen3",
            dict(layer_types=2 * [FULL, SLIDING], use_sliding_window=True),
            "`layer_types` must give a window",
        ),
        ("qwen3", dict(layer_types=2 * [SLIDING, FULL]), "`sliding_window` must be a"),
        ("qwen3", dict(layer_types=[FULL]), "`layer_types` must be a list of 4"),
        ("qwen3", dict(layer_types=4 * ["linear_attention"]), "`layer_types` must"),
        (
            "phi3",
            dict(rope_scaling=dict(type="longrope", short_factor=[1.0])),
            "`rope_scaling.*short_factor|`rope_scaling.type`.*'longrope'",
        ),
        ("gemma", dict(hidden_activation="relu"), "`hidden_activation` must go with"),
        (
            "gemma3_text",
            dict(attn_logit_softcapping=50.0),
            "`attn_logit_softcapping` must be absent. Received: 50.0",
        ),
        (
            "gemma3_text",
            dict(use_bidirectional_attention=True),
            "`use_bidirectional_attention` must be False",
        ),
        ("gemma3_text", rope(rope_theta=5.0), "`rope_parameters` must have 'full_"),
        (
            "gemma3_text",
            rope(sliding_attention=dict(LLAMA3, rope_type="llama3")),
            "`rope_parameters.sliding_attention.rope_type` must be default or linear",
        ),
        ("gemma3", {}, "`model_type` must be one of .*gemma3_text.*'gemma3'"),
        (
            "gpt2",
            dict(scale_attn_by_inverse_layer_idx=True),
            "`scale_attn_by_inverse_layer_idx` must be False. Received: True",
        ),
        ("gpt2", dict(add_cross_attention=True), "`add_cross_attention`"),
        ("opt", dict(do_layer_norm_before=False), "`do_layer_norm_before`.*False"),
        ("opt", dict(word_embed_proj_dim=42), "`word_embed_proj_dim` must be 84.*42"),
        ("opt", dict(_remove_final_layer_norm=True), "`_remove_final_layer_norm`"),
        ("opt", dict(layer_norm_elementwise_affine=False), "`layer_norm_elementwise"),
    ],
)
def test_what_cannot_be_expressed_is_refused(read, model_type, changes, message):
    with pytest.raises(ValueError, match=f"can't be loaded: {message}"):
        read(model_type, **changes)


def test_a_count_of_layers_beyond_the_tensors_is_refused(read, tmp_path):
    read(num_hidden_layers=10**9)
    from safetensors.numpy import save_file

    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="number of layers must match the tensors"):
        read_hugging_face(tmp_path)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "config.json must be JSON"),
        ("[]", "config.json must be JSON of an object. Received: list"),
        ('{"a": 1}', "format_version, registered_name, model_type.*'a'"),
    ],
)
def test_folders_of_no_known_kind_are_refused(text, message, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        DecoderLM.from_preset(tmp_path)


@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_a_path_of_nothing_is_refused(tmp_path, kind):
    with pytest.raises(FileNotFoundError, match="nothing is absent"):
        DecoderLM.from_preset(kind(tmp_path / "nothing"))
