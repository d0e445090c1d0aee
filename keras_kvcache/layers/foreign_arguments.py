"""Advice on constructor arguments of other attention layers: what to write instead.

The names are those of Keras' and keras-hub's grouped-query layers, PyTorch's layer,
flax, mlx and the configurations of transformers.
"""

from typing import Any

import keras

from keras_kvcache.errors import for_all, refuse_unknown

_WIDTH = (
    "the width follows from the inputs; `key_dim` is the size of one head, mostly the "
    "width divided by `num_heads`"
)
_ROTARY = (
    "write `rotary_embedding=RotaryEmbedding(max_wavelength=…)`, with "
    "`from keras_kvcache.layers import RotaryEmbedding`"
)


# By the name that users type; a text follows "… has no argument `name`: ".
ADVICE = {
    **for_all(
        "num_query_heads heads n_heads n_head num_attention_heads nhead num_q_heads",
        "write `num_heads`",
    ),
    **for_all(
        "head_dim head_size dim_head size_per_head qk_dim kdim d_k", "write `key_dim`"
    ),
    **for_all("value_head_dim v_head_dim vdim d_v", "write `value_dim`"),
    **for_all(
        "num_kv_heads n_kv_heads kv_heads num_groups num_query_groups",
        "write `num_key_value_heads`",
    ),
    **for_all(
        "embed_dim hidden_dim hidden_size d_model dim width model_dim qkv_features "
        "in_features features",
        _WIDTH,
    ),
    **for_all(
        "rope rotary use_rope rope_theta rope_max_wavelength rope_scaling "
        "position_embedding max_wavelength",
        _ROTARY,
    ),
    **for_all(
        "attention_dropout attn_dropout dropout_rate dropout_p", "write `dropout`"
    ),
    **for_all("bias qkv_bias attention_bias add_bias", "write `use_bias`"),
    **for_all("out_bias o_bias", "write `use_output_bias`"),
    **for_all("window window_size local_window_size", "write `sliding_window`"),
    **for_all(
        "scale scaling softmax_scale query_pre_attn_scalar",
        "write `query_scale`, the factor of the scores",
    ),
    **for_all(
        "soft_cap softcap attn_logit_softcapping attention_logit_soft_cap",
        "write `logit_soft_cap`",
    ),
    **for_all(
        "alibi use_alibi alibi_slopes",
        'write `score_bias="alibi"`',
    ),
    **for_all(
        "position_bias relative_position_bias",
        "write `score_bias`, how many distances have a bias, or a function",
    ),
    **for_all(
        "sinks attention_sinks learnable_sink s_aux", "write `use_sink_logits=True`"
    ),
    **for_all(
        "q_norm k_norm qk_norm use_qk_norm use_query_key_norm",
        "write `query_norm` and `key_norm`, each a layer such as "
        "`keras.layers.RMSNormalization()`",
    ),
    **for_all(
        "causal is_causal use_causal_mask", "write `use_causal_mask=True` in the call"
    ),
    "batch_first": "inputs are always of shape (B, T, D)",
    **for_all(
        "max_length max_seq_len max_sequence_length cache_length cache_size",
        "a cache has its own capacity; make one by "
        "`keras_kvcache.caches.CacheSpec(…).allocate()` and give it in the call",
    ),
    **for_all(
        "implementation attn_implementation use_flash_attention",
        "write `flash_attention`",
    ),
}


class ExplainsForeignArguments(keras.layers.Layer):
    """A layer that refuses foreign argument names, and says what to write instead."""

    def __new__(cls, *args, **kwargs):
        """Checks names before Python complains that required arguments are missing."""
        owner = next(base for base in cls.__mro__ if "__init__" in vars(base))
        # A subclass's constructor may take its own names out of `kwargs` first.
        if ExplainsForeignArguments in owner.__bases__:
            refuse_unknown(cls, cls.__init__, kwargs, ADVICE, leaves_rest=True)
        return super().__new__(cls, *args, **kwargs)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # From a subclass these are the arguments that it passes on.
        refuse_unknown(type(self), type(self).__init__, kwargs, ADVICE, True)
        super().__init__(*args, **kwargs)
