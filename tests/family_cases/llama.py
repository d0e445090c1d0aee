from family_cases.sizes import GROUPED, SIZES, THETA, UNUSUAL

TRANSFORMERS = {
    "llama": (
        "Llama",
        dict(
            SIZES,
            rope_parameters=dict(
                rope_type="llama3",
                rope_theta=503.0,
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=31,
            ),
        ),
    ),
    "llama_tied_linear": (
        "Llama",
        dict(
            SIZES,
            head_dim=22,
            hidden_act="gelu",
            tie_word_embeddings=True,
            attention_bias=True,
            rope_parameters=dict(rope_type="linear", factor=1.7, **THETA),
        ),
    ),
    "llama_mlp_bias": ("Llama", dict(SIZES, mlp_bias=True)),
    "llama_both_biases": ("Llama", dict(SIZES, mlp_bias=True, attention_bias=True)),
}
DETAILS = dict.fromkeys(["llama_tied_linear", "llama_mlp_bias", "llama_both_biases"])
HUB = {
    "llama": ("Llama", dict(GROUPED, **UNUSUAL, dropout=0.1)),
    "llama3": (
        "Llama3",
        dict(
            GROUPED,
            **UNUSUAL,
            rope_frequency_adjustment_factor=8.0,
            rope_low_freq_factor=1.0,
            rope_high_freq_factor=4.0,
            rope_pretraining_sequence_length=31,
            tie_word_embeddings=True,
            rope_position_scaling_factor=2.0,
        ),
    ),
}
GGUF = {"llama": {}}
