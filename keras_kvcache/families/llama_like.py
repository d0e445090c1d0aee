"""Llama's fields, keys and tensors, which its descendants share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from keras_kvcache.errors import quoted
from keras_kvcache.families.fields import ACTIVATIONS, Fields
from keras_kvcache.families.gguf_keys import Keys
from keras_kvcache.families.rope_fields import rope_options
from keras_kvcache.families.tensors import TensorNames
from keras_kvcache.families.window_fields import layer_types

# Keys that change numbers, of architectures that have them, in ways not read here.
_CHANGING_KEYS = (
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
    "attention.scale",
    "attn_logit_softcapping",
    "embedding_scale",
    "final_logit_softcapping",
    "logit_scale",
    "residual_scale",
)
PARTS = {
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/attention_output": "self_attn.o_proj",
    "attention_norm": "input_layernorm",
    "feedforward_norm": "post_attention_layernorm",
    "feedforward/gate": "mlp.gate_proj",
    "feedforward/intermediate": "mlp.up_proj",
    "feedforward/output": "mlp.down_proj",
}
TENSORS = TensorNames(
    prefix="model.",
    token_embedding="embed_tokens",
    final_norm="norm",
    block="layers.{}",
    parts=PARTS,
    # Tables of frequencies that older files have.
    ignored=r"(.*\.)?rotary_emb\.inv_freq",
)
QUERY_KEY_NORMS = {"query_norm": "self_attn.q_norm", "key_norm": "self_attn.k_norm"}
GGUF_PARTS = {
    "attention/query": "attn_q",
    "attention/key": "attn_k",
    "attention/value": "attn_v",
    "attention/attention_output": "attn_output",
    "attention_norm": "attn_norm",
    "feedforward_norm": "ffn_norm",
    "feedforward/gate": "ffn_gate",
    "feedforward/intermediate": "ffn_up",
    "feedforward/output": "ffn_down",
}
GGUF_TENSORS = TensorNames(
    token_embedding="token_embd",
    final_norm="output_norm",
    lm_head="output",
    block="blk.{}",
    parts=GGUF_PARTS,
)
_ROPE_SCALINGS = ("none", "linear")


def read_fields(
    fields: Fields,
    *,
    default_epsilon: float = 1e-6,
    default_key_value_heads: int | None = None,
    default_head_dim: int | None = None,
    default_theta: float | None = 10_000.0,
    may_rotate_partly: bool = False,
    is_tied: bool = False,
    activation: tuple[str, str] = ("hidden_act", "silu"),
    activations: Mapping[str, str] = ACTIVATIONS,
) -> dict[str, Any]:
    """Reads the fields of `config.json` that all share, but windows.

    Args:
        fields: Of the config.
        default_epsilon: Of the normalization.
        default_key_value_heads: `K` if it isn't given; `None` for `N`, as is `null`.
        default_head_dim: `H` if it isn't given; `None` for `D / N`.
        default_theta: Base of the rotary frequencies; `None` for a family that says
            otherwise how it rotates.
        may_rotate_partly: Whether it rotates but a part of a head if it's told to.
        is_tied: Whether the language head is the embedding if nothing is said.
        activation: The key of the activation, and its default.
        activations: What their names stand for.
    """
    D, N = fields.size("hidden_size"), fields.size("num_attention_heads")
    K = fields.size("num_key_value_heads", default_key_value_heads or N, null=N)
    H = fields.size("head_dim", default_head_dim)
    if H is None and D % N:
        raise ValueError(
            "`hidden_size` must be a multiple of `num_attention_heads` unless "
            f"`head_dim` is given. Received: {D} and {N}"
        )
    if N % K:
        raise ValueError(
            "`num_attention_heads` must be a multiple of `num_key_value_heads`. "
            f"Received: {N} and {K}"
        )
    H, rope = H or D // N, {}
    if default_theta is not None:
        rope = rope_options(fields, H, default_theta, may_rotate_partly)
    return {
        "vocabulary_size": fields.size("vocab_size"),
        "num_layers": fields.size("num_hidden_layers"),
        "num_query_heads": N,
        "num_key_value_heads": K,
        "hidden_dim": D,
        "intermediate_dim": fields.size("intermediate_size"),
        "head_dim": H,
        "max_sequence_length": fields.size("max_position_embeddings"),
        "layer_norm_epsilon": fields.real("rms_norm_eps", default_epsilon),
        "activation": fields.choice(activation[0], activations, activation[1]),
        "tie_word_embeddings": fields.flag("tie_word_embeddings", is_tied),
        "normalization": "rms_norm",
        "gated_feedforward": True,
        "use_bias": False,
        "attention_bias": False,
        "position_embedding": "rotary",
        **rope,
    }


def with_biases(
    fields: Fields, config: dict[str, Any], names: TensorNames = TENSORS
) -> tuple[dict[str, Any], TensorNames]:
    """Biases on all projections of attention, and on those of the feed-forward part.

    The decoder ties the bias of attention's output to the latter: where a model has
    but one of the two, the other is zero.
    """
    attention = fields.flag("attention_bias", False)
    mlp = fields.flag("mlp_bias", False)
    config = {**config, "attention_bias": attention, "use_bias": attention or mlp}
    zero = [] if attention else ["attention/attention_output"]
    if not mlp:
        zero += [f"feedforward/{name}" for name in ("gate", "intermediate", "output")]
    return config, replace(names, zero_biases=tuple(zero))


def one_window(
    fields: Fields, num_layers: int, default: int | None = None
) -> dict[str, Any]:
    """One window for all layers, or none."""
    window = fields.size("sliding_window", default, null=None)
    types = layer_types(fields, [window is not None] * num_layers)
    # A model with both kinds of layer isn't of these families.
    if len(set(types)) > 1 or (types[0] == "sliding_attention") != (window is not None):
        raise ValueError(
            "`layer_types` must be alike and go with `sliding_window`. Received: "
            f"{quoted(types)}, sliding_window={window}"
        )
    return {"sliding_window": window}


def read_keys(keys: Keys) -> dict[str, Any]:
    """Reads the keys of a GGUF file that all share.

    `rope_frequency_factors` is left at None: it comes from a tensor.

    Raises:
        ValueError: A key is missing, has the wrong type or asks for what the
            decoder doesn't do. The message names the key and its value.
    """
    for key in _CHANGING_KEYS:
        if key in keys:
            raise keys.error(key, "be absent", quoted(keys[key]))
    if not keys.get("attention.causal", bool, True):
        raise keys.error("attention.causal", "be true", False)
    experts = keys.get("expert_count", int, 0)
    if experts > 0:
        raise ValueError(
            "mixtures of experts aren't supported: "
            f"'{keys.named('expert_count')}' must be 0. Received: {experts}"
        )
    D = keys.size("embedding_length")
    N = keys.size("attention.head_count")
    K = keys.size("attention.head_count_kv", N)
    if N % K:
        other = keys.named("attention.head_count_kv")
        raise keys.error(
            "attention.head_count", f"be a multiple of '{other}'", f"{N} and {K}"
        )
    if "attention.key_length" not in keys and D % N:
        other = keys.named("attention.head_count")
        raise keys.error(
            "embedding_length", f"be a multiple of '{other}'", f"{D} and {N}"
        )
    H = keys.size("attention.key_length", D // N)
    values = keys.size("attention.value_length", H)
    if values != H:
        raise keys.error("attention.value_length", f"equal the key length {H}", values)
    rotary_dim = keys.size("rope.dimension_count", H)
    if rotary_dim % 2 or rotary_dim > H:
        rule = f"be even and at most the head size {H}"
        raise keys.error("rope.dimension_count", rule, rotary_dim)
    embedding = keys.shapes.get("token_embd.weight", ())
    if len(embedding) != 2:
        raise ValueError("tensor 'token_embd.weight' must be there, with two axes.")
    config = {
        "vocabulary_size": embedding[0],
        "num_layers": keys.size("block_count"),
        "num_query_heads": N,
        "num_key_value_heads": K,
        "hidden_dim": D,
        "intermediate_dim": keys.size("feed_forward_length"),
        "head_dim": H,
        "max_sequence_length": keys.size("context_length"),
        "layer_norm_epsilon": keys.real("attention.layer_norm_rms_epsilon"),
        "rope_max_wavelength": keys.real("rope.freq_base", 10000.0),
        "rope_position_scaling_factor": _position_scaling(keys),
        "rope_frequency_factors": None,
        "rotary_dim": None if rotary_dim == H else rotary_dim,
        "use_bias": False,
        "tie_word_embeddings": "output.weight" not in keys.shapes,
        "normalization": "rms_norm",
        "activation": "silu",
        "gated_feedforward": True,
        "position_embedding": "rotary",
    }
    if "attention.sliding_window" in keys:
        config["sliding_window"] = keys.size("attention.sliding_window")
    return config


def _position_scaling(keys: Keys) -> float:
    """The divisor of positions before rotation."""
    # A factor without a type means linear, as does the older name of the key.
    kind = keys.get("rope.scaling.type", str, "linear")
    if kind not in _ROPE_SCALINGS:
        rule = f"be one of {_ROPE_SCALINGS}"
        raise keys.error("rope.scaling.type", rule, quoted(kind))
    if kind == "none":
        return 1.0
    return keys.real("rope.scaling.factor", keys.real("rope.scale_linear", 1.0))
