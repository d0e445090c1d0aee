from family_cases.sizes import (
    FULL,
    GROUPED,
    SCALED,
    SIZES,
    SLIDING,
    THETA,
    WIDE_HEADS,
)

WINDOW = dict(use_sliding_window=True, sliding_window=13, max_window_layers=0)
TRANSFORMERS = {
    "qwen2": ("Qwen2", dict(SIZES, **WINDOW, rope_parameters=dict(THETA))),
    "qwen2_by_layer": (
        "Qwen2",
        dict(SIZES, **WINDOW, layer_types=[SLIDING, FULL], tie_word_embeddings=True),
    ),
    "qwen3": ("Qwen3", dict(WIDE_HEADS, **WINDOW, attention_bias=True)),
}
DETAILS = dict.fromkeys(["qwen2_by_layer"])
HUB = {
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
}
GGUF = {
    "qwen2": {"attn_q.bias": "NH", "attn_k.bias": "KH", "attn_v.bias": "KH"},
    "qwen3": {"attn_q_norm.weight": "H", "attn_k_norm.weight": "H"},
}
