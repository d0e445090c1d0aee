from family_cases.sizes import GROUPED, SCALED, SIZES

TRANSFORMERS = {
    "mixtral": (
        "Mixtral",
        dict(SIZES, num_local_experts=5, num_experts_per_tok=3, sliding_window=13),
    ),
}
HUB = {
    # So few that the chosen ones alone are asked where there is one row.
    "mixtral": (
        "Mixtral",
        dict(GROUPED, **SCALED, num_experts=5, top_k=2, sliding_window=13),
    ),
}
