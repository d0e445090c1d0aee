from family_cases.sizes import FULL, GROUPED, SLIDING, THETA, WIDE_HEADS

GEMMA = dict(WIDE_HEADS, rms_norm_eps=1e-2, attention_bias=True)
GEMMA2 = dict(
    GEMMA,
    query_pre_attn_scalar=17,
    final_logit_softcapping=3.0,
    sliding_window=13,
)
TRANSFORMERS = {
    "gemma": ("Gemma", dict(GEMMA, rope_parameters=dict(THETA))),
    "gemma2": ("Gemma2", dict(GEMMA2, attn_logit_softcapping=2.0)),
    "gemma3": (
        "Gemma3",
        dict(
            GEMMA2,
            num_hidden_layers=4,
            layer_types=[SLIDING, SLIDING, FULL, SLIDING],
            rope_parameters=dict(
                full_attention=dict(rope_type="linear", factor=1.7, rope_theta=5003.0),
                sliding_attention=dict(rope_type="default", rope_theta=503.0),
            ),
        ),
    ),
}
HUB_GEMMA = dict(GROUPED, head_dim=22, intermediate_dim=2 * 59, layer_norm_epsilon=1e-3)
HUB_GEMMA2 = dict(
    HUB_GEMMA,
    use_post_ffw_norm=True,
    use_post_attention_norm=True,
    attention_logit_soft_cap=5.0,
    final_logit_soft_cap=0.3,
    use_sliding_window_attention=True,
    sliding_window_size=13,
)
HUB_GEMMA3 = dict(
    HUB_GEMMA2,
    image_size=None,
    local_rope_scaling_factor=1.3,
    global_rope_scaling_factor=1.7,
)
HUB = {
    "gemma": ("Gemma", HUB_GEMMA),
    "gemma2": ("Gemma", dict(HUB_GEMMA2, query_head_dim_normalize=False)),
    "gemma3": ("Gemma3", dict(HUB_GEMMA3, num_layers=6)),
    # So few layers that none sees all.
    "gemma3_short": ("Gemma3", dict(HUB_GEMMA3, num_layers=3)),
    "gemma3_full": (
        "Gemma3",
        dict(
            HUB_GEMMA,
            image_size=None,
            use_query_key_norm=False,
            global_rope_scaling_factor=1.7,
        ),
    ),
}
