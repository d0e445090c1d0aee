from family_cases.sizes import GROUPED, SIZES, THETA, UNUSUAL

TRANSFORMERS = {
    "phi3": ("Phi3", dict(SIZES, sliding_window=13, rope_parameters=dict(THETA))),
    "phi3_partial": (
        "Phi3",
        dict(
            SIZES,
            rope_parameters=dict(THETA, rope_type="default", partial_rotary_factor=0.6),
        ),
    ),
}
DETAILS = dict.fromkeys(["phi3_partial"])
SU_ROPE = dict(
    rope_scaling_type="su",
    rope_scaling_short_factor=[1.0, 1.1, 1.3, 1.7, 2.3, 3.1, 4.2],
    rope_scaling_long_factor=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0],
    max_sequence_length=509,
    pretraining_sequence_length=127,
)
HUB = {
    "phi3": ("Phi3", dict(GROUPED, **UNUSUAL)),
    "phi3_su": ("Phi3", dict(GROUPED, **UNUSUAL, **SU_ROPE)),
}
