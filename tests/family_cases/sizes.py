"""Sizes of the small models: primes, and multiples of them where heads divide."""

# In transformers' words.
SIZES = dict(
    vocab_size=101,
    hidden_size=84,
    intermediate_size=59,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=613,
    rms_norm_eps=1e-3,
    bos_token_id=3,
    eos_token_id=5,
    pad_token_id=0,
)
WIDE_HEADS = dict(SIZES, head_dim=22)
THETA = dict(rope_theta=503.0)
SLIDING, FULL = "sliding_attention", "full_attention"
# In keras-hub's.
HUB_SIZES = dict(vocabulary_size=101, num_layers=2, hidden_dim=84, intermediate_dim=59)
GROUPED = dict(HUB_SIZES, num_query_heads=6, num_key_value_heads=2)
# Other numbers than the default ones of all families.
UNUSUAL = dict(rope_max_wavelength=503, layer_norm_epsilon=1e-3)
SCALED = dict(UNUSUAL, rope_scaling_factor=1.5)
ENCODER_DECODER = dict(
    vocabulary_size=101, num_layers=2, num_heads=7, hidden_dim=42, intermediate_dim=59
)
