from family_cases.sizes import GROUPED, SCALED, THETA, WIDE_HEADS

TRANSFORMERS = {
    "mistral": (
        "Mistral",
        dict(WIDE_HEADS, sliding_window=13, rope_parameters=dict(THETA)),
    ),
}
HUB = {
    "mistral": ("Mistral", dict(GROUPED, **SCALED, sliding_window=13, head_dim=22)),
}
