"""Translates the `config.json` of each Hugging Face family to the decoder's arguments.

A family is a function of a config that gives the decoder's arguments and the layout
of the weights. Defaults are those of the family's class in transformers, whose files
leave out what equals them. Rates of dropout aren't taken over: a model is loaded as it
answers, not as it was trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from keras_kvcache.errors import quoted
from keras_kvcache.loaders.hugging_face_fields import (
    Fields,
    gemma3_rope_options,
    layer_types,
    rope_options,
    window_options,
)
from keras_kvcache.loaders.hugging_face_layouts import (
    gpt2_layout,
    llama_layout,
    opt_layout,
)

# By the names that transformers has for them.
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
# Gemma's first files say "gelu" and mean the approximation.
_GEMMA_ACTIVATIONS = {**_ACTIVATIONS, "gelu": "gelu_tanh"}


class Family(NamedTuple):
    """Reads the configs of one family.

    Attributes:
        architectures: The classes whose weights the decoder has.
        read: Config to arguments and layout.
    """

    architectures: tuple[str, ...]
    read: Callable[[Fields], tuple[dict[str, Any], Callable]]


def read_config(values: dict[str, Any]) -> tuple[dict[str, Any], Callable]:
    """Reads the decoder's arguments and the layout of the files' tensors.

    Args:
        values: Of `config.json`.

    Returns:
        JSON-able keyword arguments of the decoder language model, and a function
        of these and of the tensors' names that gives a `Source` for each weight.

    Raises:
        ValueError: A key is missing, has the wrong type or asks for what the
            decoder doesn't do. The message names the key and its value.
    """
    fields = Fields(values)
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(
            f"`model_type` must be one of {', '.join(FAMILIES)}. Received: "
            f"{quoted(model_type)}"
        )
    family = FAMILIES[model_type]
    fields.must_be("architectures", *([name] for name in family.architectures), [])
    # Variants that other code than the family's own would have to run.
    fields.must_be("quantization_config")
    fields.must_be("is_encoder_decoder", False)
    fields.must_be("add_cross_attention", False)
    fields.must_be("rope_interleaved", False)
    fields.must_be("use_bidirectional_attention", False)
    return family.read(fields)


def _llama_like(
    fields: Fields,
    *,
    default_epsilon: float = 1e-6,
    default_groups: int | None = None,
    default_head_dim: int | None = None,
    is_tied: bool = False,
    activation: tuple[str, str] = ("hidden_act", "silu"),
    activations: dict[str, str] = _ACTIVATIONS,
) -> dict[str, Any]:
    """Reads the fields that Llama and its descendants share, but rotation and windows.

    Args:
        fields: Of the config.
        default_epsilon: Of the normalization.
        default_groups: `K` if it isn't given; `None` for `N`, as is `null`.
        default_head_dim: `H` if it isn't given; `None` for `D / N`.
        is_tied: Whether the language head is the embedding if nothing is said.
        activation: The key of the activation, and its default.
        activations: What their names stand for.
    """
    D, N = fields.size("hidden_size"), fields.size("num_attention_heads")
    K = fields.size("num_key_value_heads", default_groups or N, null=N)
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
    return {
        "vocabulary_size": fields.size("vocab_size"),
        "num_layers": fields.size("num_hidden_layers"),
        "num_query_heads": N,
        "num_key_value_heads": K,
        "hidden_dim": D,
        "intermediate_dim": fields.size("intermediate_size"),
        "head_dim": H or D // N,
        "max_sequence_length": fields.size("max_position_embeddings"),
        "layer_norm_epsilon": fields.real("rms_norm_eps", default_epsilon),
        "activation": fields.choice(activation[0], activations, activation[1]),
        "tie_word_embeddings": fields.flag("tie_word_embeddings", is_tied),
        "normalization": "rms_norm",
        "gated_feedforward": True,
        "use_bias": False,
        "attention_bias": False,
        "query_key_norm": False,
        "use_post_attention_norm": False,
        "num_experts": None,
        "position_embedding": "rotary",
    }


def _llama(fields):
    fields.must_be("sliding_window")
    config = _llama_like(fields)
    return _with_biases(fields, config | _rope(fields, config))


def _with_biases(fields, config):
    """Biases on all projections of attention, and on those of the feed-forward part.

    The decoder ties the bias of attention's output to the latter: where a model has
    but one of the two, the other is zero.
    """
    attention = fields.flag("attention_bias", False)
    mlp = fields.flag("mlp_bias", False)
    config |= {"attention_bias": attention, "use_bias": attention or mlp}
    return config, partial(llama_layout, output_bias=attention, mlp_bias=mlp)


def _rope(fields, config, default_theta=10_000.0, **how):
    return rope_options(fields, config["head_dim"], default_theta, **how)


def _one_window(fields, layers, default=None):
    """One window for all layers, or none."""
    window = fields.size("sliding_window", default, null=None)
    types = layer_types(fields, [window is not None] * layers)
    # A model with both kinds of layer isn't of these families.
    if len(set(types)) > 1 or (types[0] == "sliding_attention") != (window is not None):
        raise ValueError(
            "`layer_types` must be alike and go with `sliding_window`. Received: "
            f"{quoted(types)}, sliding_window={window}"
        )
    return {"sliding_window": window}


def _mistral(fields):
    config = _llama_like(fields, default_groups=8)
    config |= _rope(fields, config)
    return config | _one_window(fields, config["num_layers"], 4096), llama_layout


def _mixtral(fields):
    config = _llama_like(fields, default_epsilon=1e-5, default_groups=8)
    config |= _rope(fields, config, 1_000_000.0)
    config |= _one_window(fields, config["num_layers"])
    config["num_experts"] = fields.size("num_local_experts", 8)
    config["num_experts_per_token"] = fields.size("num_experts_per_tok", 2)
    return config, llama_layout


def _phi3(fields):
    config = _llama_like(fields, default_epsilon=1e-5)
    config |= _rope(fields, config, may_be_partial=True)
    config |= _one_window(fields, config["num_layers"])
    return config, partial(llama_layout, is_fused=True)


def _qwen_window(fields, layers):
    """Qwen's window, which the first `max_window_layers` layers don't have."""
    window = None
    if fields.flag("use_sliding_window", False):
        window = fields.size("sliding_window", 4096, null=None)
    first, named = fields.values.get("max_window_layers", 28), "max_window_layers"
    if not isinstance(first, int):
        raise ValueError(f"`{named}` must be an integer. Received: {quoted(first)}")
    slides = [window is not None and i >= first for i in range(layers)]
    types = fields.values.get("layer_types")
    told_by = (named, first) if types is None else ("layer_types", types)
    return window_options(window, layer_types(fields, slides), *told_by)


def _qwen2(fields):
    config = _llama_like(fields, default_groups=32)
    config |= _rope(fields, config) | _qwen_window(fields, config["num_layers"])
    return config | {"attention_bias": True}, llama_layout


def _qwen3(fields):
    config = _llama_like(fields, default_groups=32, default_head_dim=128)
    config |= _rope(fields, config) | _qwen_window(fields, config["num_layers"])
    return _with_biases(fields, config | {"query_key_norm": True})


def _gemma_like(fields, activation, default_groups=4):
    """Reads the fields that the Gemma models share."""
    config = _llama_like(
        fields,
        default_groups=default_groups,
        default_head_dim=256,
        is_tied=True,
        activation=(activation, "gelu_pytorch_tanh"),
        activations=_GEMMA_ACTIVATIONS,
    )
    return config | {
        "normalization": "unit_offset_rms_norm",
        "embedding_scale": math.sqrt(config["hidden_dim"]),
    }


def _gemma(fields):
    config = _gemma_like(fields, "hidden_act", default_groups=16)
    named = fields.choice("hidden_activation", _GEMMA_ACTIVATIONS, "gelu_new")
    if fields.values.get("hidden_activation") and named != config["activation"]:
        raise ValueError(
            "`hidden_activation` must go with `hidden_act`. Received: "
            f"{quoted(fields.values['hidden_activation'])}"
        )
    return _with_biases(fields, config | _rope(fields, config))


def _gemma2(fields):
    config = _gemma_like(fields, "hidden_activation")
    config |= _rope(fields, config)
    config |= _gemma_extras(fields, config, 30.0, default_pattern=2)
    config["attention_logit_soft_cap"] = fields.real(
        "attn_logit_softcapping", 50.0, null=None
    )
    return _with_biases(fields, config)


def _gemma3(fields):
    # transformers reads it and doesn't apply it, so what is meant isn't known.
    fields.must_be("attn_logit_softcapping")
    config = _gemma_like(fields, "hidden_activation")
    pattern = fields.size("_sliding_window_pattern", 6)
    pattern = fields.size("sliding_window_pattern", pattern)
    config |= _gemma_extras(fields, config, None, default_pattern=pattern)
    slides = config["sliding_window"] is not None
    config |= gemma3_rope_options(fields, config["head_dim"], slides)
    return _with_biases(fields, config | {"query_key_norm": True})


def _gemma_extras(fields, config, default_cap, default_pattern):
    """Reads what Gemma 2 and 3 add: norms, a cap, a scale and alternating windows."""
    slides = [i % default_pattern != 0 for i in range(1, config["num_layers"] + 1)]
    types = layer_types(fields, slides)
    window = fields.size("sliding_window", 4096, null=None)
    return {
        "use_post_attention_norm": True,
        "use_post_ffw_norm": True,
        "query_scale": fields.real("query_pre_attn_scalar", 256.0) ** -0.5,
        "final_logit_soft_cap": fields.real(
            "final_logit_softcapping", default_cap, null=None
        ),
        **window_options(window, types, "layer_types", types),
    }


def _learned(D, N, F, **others):
    """Arguments that GPT-2 and OPT share."""
    if D % N:
        raise ValueError(
            "The width must be a multiple of the number of heads. Received: "
            f"{D} and {N}"
        )
    return {
        "num_query_heads": N,
        "num_key_value_heads": N,
        "hidden_dim": D,
        "intermediate_dim": F,
        "head_dim": D // N,
        "normalization": "layer_norm",
        "gated_feedforward": False,
        "position_embedding": "learned",
        **others,
    }


def _gpt2(fields):
    fields.must_be("scale_attn_by_inverse_layer_idx", False)
    D = fields.size("n_embd")
    config = _learned(
        D,
        fields.size("n_head"),
        fields.size("n_inner", 4 * D),
        vocabulary_size=fields.size("vocab_size"),
        num_layers=fields.size("n_layer"),
        max_sequence_length=fields.size("n_positions"),
        layer_norm_epsilon=fields.real("layer_norm_epsilon", 1e-5),
        activation=fields.choice("activation_function", _ACTIVATIONS, "gelu_new"),
        use_bias=True,
        tie_word_embeddings=fields.flag("tie_word_embeddings", True),
    )
    if not fields.flag("scale_attn_weights", True):
        config["query_scale"] = 1.0
    return config, gpt2_layout


def _opt(fields):
    D = fields.size("hidden_size")
    fields.must_be("word_embed_proj_dim", D)
    fields.must_be("do_layer_norm_before", True)
    fields.must_be("_remove_final_layer_norm", False)
    fields.must_be("layer_norm_elementwise_affine", True)
    config = _learned(
        D,
        fields.size("num_attention_heads"),
        fields.size("ffn_dim"),
        vocabulary_size=fields.size("vocab_size"),
        num_layers=fields.size("num_hidden_layers"),
        max_sequence_length=fields.size("max_position_embeddings"),
        layer_norm_epsilon=1e-5,
        activation=fields.choice("activation_function", _ACTIVATIONS, "relu"),
        use_bias=fields.flag("enable_bias", True),
        tie_word_embeddings=fields.flag("tie_word_embeddings", True),
    )
    return config, opt_layout


def _classes(name):
    return (f"{name}ForCausalLM", f"{name}Model")


# By `model_type`. SmolLM2 is a Llama.
FAMILIES = {
    "llama": Family(_classes("Llama"), _llama),
    "mistral": Family(_classes("Mistral"), _mistral),
    "mixtral": Family(_classes("Mixtral"), _mixtral),
    "qwen2": Family(_classes("Qwen2"), _qwen2),
    "qwen3": Family(_classes("Qwen3"), _qwen3),
    "phi3": Family(_classes("Phi3"), _phi3),
    "gpt2": Family(("GPT2LMHeadModel", "GPT2Model"), _gpt2),
    "opt": Family(_classes("OPT"), _opt),
    "gemma": Family(_classes("Gemma"), _gemma),
    "gemma2": Family(_classes("Gemma2"), _gemma2),
    "gemma3_text": Family(("Gemma3ForCausalLM", "Gemma3TextModel"), _gemma3),
}
