"""Small keras-hub models of each family, with what the family has switched on."""

import functools

import keras
import numpy as np
import pytest

hub = pytest.importorskip("keras_hub")

SIZES = dict(vocabulary_size=101, num_layers=2, hidden_dim=84, intermediate_dim=59)
GROUPED = dict(SIZES, num_query_heads=6, num_key_value_heads=2)
LLAMA3_ROPE = dict(
    rope_frequency_adjustment_factor=8.0,
    rope_low_freq_factor=1.0,
    rope_high_freq_factor=4.0,
    rope_pretraining_sequence_length=31,
)
# Other numbers than the default ones of all families.
UNUSUAL = dict(rope_max_wavelength=503, layer_norm_epsilon=1e-3)
SCALED = dict(UNUSUAL, rope_scaling_factor=1.5)
GEMMA = dict(GROUPED, head_dim=22, intermediate_dim=2 * 59, layer_norm_epsilon=1e-3)
GEMMA2 = dict(
    GEMMA,
    use_post_ffw_norm=True,
    use_post_attention_norm=True,
    attention_logit_soft_cap=5.0,
    final_logit_soft_cap=0.3,
    use_sliding_window_attention=True,
    sliding_window_size=13,
)
GEMMA3 = dict(
    GEMMA2,
    image_size=None,
    local_rope_scaling_factor=1.3,
    global_rope_scaling_factor=1.7,
)
SU_ROPE = dict(
    rope_scaling_type="su",
    rope_scaling_short_factor=[1.0, 1.1, 1.3, 1.7, 2.3, 3.1, 4.2],
    rope_scaling_long_factor=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0],
    max_sequence_length=509,
    pretraining_sequence_length=127,
)
# By the name of a case: the family, as keras-hub's classes begin, and its arguments.
CASES = {
    "gpt2": ("GPT2", dict(SIZES, num_heads=7, max_sequence_length=113)),
    "opt": ("OPT", dict(SIZES, num_heads=7, max_sequence_length=113)),
    "llama": (
        "Llama",
        dict(GROUPED, **UNUSUAL, dropout=0.1),
    ),
    "llama3": (
        "Llama3",
        dict(
            GROUPED,
            **LLAMA3_ROPE,
            **UNUSUAL,
            tie_word_embeddings=True,
            rope_position_scaling_factor=2.0,
        ),
    ),
    "mistral": (
        "Mistral",
        dict(GROUPED, **SCALED, sliding_window=13, head_dim=22),
    ),
    # So few that the chosen ones alone are asked where there is one row.
    "mixtral": (
        "Mixtral",
        dict(GROUPED, **SCALED, num_experts=5, top_k=2, sliding_window=13),
    ),
    "phi3": ("Phi3", dict(GROUPED, **UNUSUAL)),
    "phi3_su": ("Phi3", dict(GROUPED, **UNUSUAL, **SU_ROPE)),
    "qwen": (
        "Qwen",
        dict(
            GROUPED,
            **SCALED,
            tie_word_embeddings=False,
            use_sliding_window_attention=True,
            sliding_window_size=13,
        ),
    ),
    "qwen3": (
        "Qwen3",
        dict(
            GROUPED,
            **SCALED,
            head_dim=22,
            tie_word_embeddings=False,
            sliding_window_size=13,
        ),
    ),
    "gemma": ("Gemma", GEMMA),
    "gemma2": ("Gemma", dict(GEMMA2, query_head_dim_normalize=False)),
    "gemma3": ("Gemma3", dict(GEMMA3, num_layers=6)),
    # So few layers that none sees all.
    "gemma3_short": ("Gemma3", dict(GEMMA3, num_layers=3)),
    "gemma3_full": (
        "Gemma3",
        dict(
            GEMMA,
            image_size=None,
            use_query_key_norm=False,
            global_rope_scaling_factor=1.7,
        ),
    ),
}


def make_hub_lm(case, **options):
    """A keras-hub model whose random weights are large enough for varied answers."""
    family, arguments = CASES[case]
    keras.utils.set_random_seed(7)
    backbone = getattr(hub.models, f"{family}Backbone")(**{**arguments, **options})
    rng = np.random.default_rng(7)
    for weight in backbone.weights:
        noise = 0.2 * rng.normal(size=weight.shape)
        if family.startswith("Gemma") and "embedding" in weight.path:
            # Scaled up and tied, larger ones would only ever repeat a token.
            weight.assign(0.1 * noise)
        else:
            weight.assign(keras.ops.convert_to_numpy(weight) + noise)
    lm = getattr(hub.models, f"{family}CausalLM")(backbone=backbone, preprocessor=None)
    lm.compile(sampler="greedy")
    return lm


@functools.cache
def shared_hub_lm(case):
    """One for tests that leave it as it is, so that it compiles once."""
    return make_hub_lm(case)


def prompts(lengths, width, seed=11):
    """Right-padded prompts in keras-hub's form."""
    rng = np.random.default_rng(seed)
    mask = np.arange(width) < np.array(lengths)[:, None]
    ids = rng.integers(1, SIZES["vocabulary_size"], mask.shape)
    return {"token_ids": (ids * mask).astype("int32"), "padding_mask": mask}


def hub_generate(lm, inputs, stop_token_ids=None):
    """Token ids and mask by keras-hub's own program, as NumPy arrays."""
    answer = lm.make_generate_function()(dict(inputs), stop_token_ids=stop_token_ids)
    return {
        name: keras.ops.convert_to_numpy(answer[name])
        for name in ("token_ids", "padding_mask")
    }


def make_reader():
    """A GPT-2 that reads and writes lower-case text."""
    letters = [chr(code) for code in range(97, 123)]
    # The end isn't token 0, with which keras-hub pads.
    tokens = ["\u0120", *letters, "on", "<|endoftext|>"]
    tokenizer = hub.models.GPT2Tokenizer(
        vocabulary={token: i for i, token in enumerate(tokens)}, merges=["o n"]
    )
    lm = make_hub_lm("gpt2", vocabulary_size=len(tokens))
    lm.preprocessor = hub.models.GPT2CausalLMPreprocessor(tokenizer, sequence_length=31)
    return lm
