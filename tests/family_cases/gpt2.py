from family_cases.sizes import HUB_SIZES

TRANSFORMERS = {
    "gpt2": (
        "GPT2",
        dict(
            vocab_size=101,
            n_embd=42,
            n_inner=61,
            n_layer=2,
            n_head=7,
            n_positions=113,
            layer_norm_epsilon=1e-3,
            bos_token_id=3,
            eos_token_id=5,
        ),
    ),
    "gpt2_unscaled": (
        "GPT2",
        dict(
            vocab_size=101,
            n_embd=42,
            n_layer=2,
            n_head=3,
            n_positions=67,
            scale_attn_weights=False,
            tie_word_embeddings=False,
            activation_function="relu",
            bos_token_id=3,
            eos_token_id=5,
        ),
    ),
}
DETAILS = dict.fromkeys(["gpt2_unscaled"])
HUB = {"gpt2": ("GPT2", dict(HUB_SIZES, num_heads=7, max_sequence_length=113))}
