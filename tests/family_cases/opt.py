from family_cases.sizes import HUB_SIZES

TRANSFORMERS = {
    "opt": (
        "OPT",
        dict(
            vocab_size=101,
            hidden_size=42,
            ffn_dim=61,
            num_hidden_layers=2,
            num_attention_heads=7,
            max_position_embeddings=113,
            word_embed_proj_dim=42,
        ),
    ),
}
HUB = {"opt": ("OPT", dict(HUB_SIZES, num_heads=7, max_sequence_length=113))}
