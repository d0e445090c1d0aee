HUB_REFUSED = {
    "t5": (
        "T5",
        dict(
            vocabulary_size=101,
            num_layers=1,
            num_heads=2,
            hidden_dim=8,
            intermediate_dim=16,
        ),
    ),
}
