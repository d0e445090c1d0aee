"""Qwen 2, 2.5 and 3 without experts (Yang et al., 2024 and 2025).

https://arxiv.org/abs/2407.10671, https://arxiv.org/abs/2505.09388
"""

import sys
from dataclasses import replace

from keras_kvcache.errors import quoted
from keras_kvcache.families import keras_hub_parts, llama_like
from keras_kvcache.families.family import Family, Gguf, HuggingFace, KerasHub, classes
from keras_kvcache.families.window_fields import layer_types, window_options


def _read2(fields):
    config = llama_like.read_fields(fields, default_key_value_heads=32)
    config |= _windows(fields, config["num_layers"])
    return config | {"attention_bias": True}, llama_like.TENSORS


def _read3(fields):
    config = llama_like.read_fields(
        fields, default_key_value_heads=32, default_head_dim=128
    )
    config |= _windows(fields, config["num_layers"])
    config["query_key_norm"] = True
    parts = {**llama_like.PARTS, **llama_like.QUERY_KEY_NORMS}
    names = replace(llama_like.TENSORS, parts=parts)
    return llama_like.with_biases(fields, config, names)


def _read_keys2(keys):
    config = llama_like.read_keys(keys)
    return config | {"attention_bias": True}, llama_like.GGUF_TENSORS


def _read_keys3(keys):
    config = llama_like.read_keys(keys)
    parts = {"query_norm": "attn_q_norm", "key_norm": "attn_k_norm"}
    parts = {**llama_like.GGUF_PARTS, **parts}
    names = replace(llama_like.GGUF_TENSORS, parts=parts)
    return config | {"query_key_norm": True}, names


def _windows(fields, layers):
    """A window, which the first `max_window_layers` layers don't have."""
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


def _options2(backbone):
    window = backbone.sliding_window_size
    if not backbone.use_sliding_window_attention:
        window = None
    attention = keras_hub_parts.attention_of(backbone)
    return dict(
        keras_hub_parts.linear_rope(attention.rotary_embedding_layer),
        sliding_window=_unfused_window(attention, window),
    )


def _options3(backbone):
    attention = keras_hub_parts.attention_of(backbone)
    return dict(
        keras_hub_parts.linear_rope(attention.rotary_embedding_layer),
        head_dim=attention.head_dim,
        sliding_window=_unfused_window(attention, backbone.sliding_window_size or None),
    )


def _unfused_window(attention, sliding_window):
    """The window of an attention layer that has one outside of fused kernels only.

    keras-hub's layers pass it over wherever there is a fused kernel, as there always
    is on JAX. The numbers are to be those of the model at hand, so we do as it does.
    """
    module = sys.modules[type(attention).__module__]
    return None if module.fused_attention_op_available() else sliding_window


def _parts3(block):
    attention = block._self_attention_layer
    return dict(
        keras_hub_parts.llama_decoder(block),
        query_norm=attention._query_dense_layer_norm,
        key_norm=attention._key_dense_layer_norm,
    )


_KNOWS = """
    rope_max_wavelength rope_scaling_factor tie_word_embeddings sliding_window_size
""".split()
_KNOWS2 = [*_KNOWS, "use_sliding_window_attention"]
_BACKBONES = (
    KerasHub("QwenBackbone", _options2, keras_hub_parts.llama_decoder, knows=_KNOWS2),
    KerasHub("Qwen3Backbone", _options3, _parts3, knows=[*_KNOWS, "head_dim"]),
)
FAMILY = Family(
    "Qwen 2 to 3",
    hugging_face=(
        HuggingFace("qwen2", classes("Qwen2"), _read2),
        HuggingFace("qwen3", classes("Qwen3"), _read3),
    ),
    gguf=(Gguf("qwen2", _read_keys2), Gguf("qwen3", _read_keys3)),
    keras_hub=_BACKBONES,
)
