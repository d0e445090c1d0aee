"""Gemma 1 to 3 for text (Gemma Team, 2024 and 2025).

https://arxiv.org/abs/2403.08295, https://arxiv.org/abs/2408.00118,
https://arxiv.org/abs/2503.19786
"""

import math
from dataclasses import replace

from keras_kvcache.errors import quoted
from keras_kvcache.families import keras_hub_parts, llama_like
from keras_kvcache.families.family import Family, HuggingFace, KerasHub, classes
from keras_kvcache.families.fields import ACTIVATIONS, Fields
from keras_kvcache.families.rope_fields import as_rope_arguments, read_rotation
from keras_kvcache.families.window_fields import (
    FULL,
    SLIDING,
    layer_types,
    window_options,
)

# The first files say "gelu" and mean the approximation.
_ACTIVATIONS = {**ACTIVATIONS, "gelu": "gelu_tanh"}
_FOUR_NORMS = {
    **llama_like.PARTS,
    "post_attention_norm": "post_attention_layernorm",
    "feedforward_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_SIX_NORMS = {**_FOUR_NORMS, **llama_like.QUERY_KEY_NORMS}
_TENSORS2 = replace(llama_like.TENSORS, parts=_FOUR_NORMS)
_TENSORS3 = replace(llama_like.TENSORS, parts=_SIX_NORMS)


def _read_shared(fields, activation, default_key_value_heads=4, default_theta=10_000.0):
    """Reads the fields that all three share."""
    config = llama_like.read_fields(
        fields,
        default_key_value_heads=default_key_value_heads,
        default_head_dim=256,
        default_theta=default_theta,
        is_tied=True,
        activation=(activation, "gelu_pytorch_tanh"),
        activations=_ACTIVATIONS,
    )
    return config | {
        "normalization": "unit_offset_rms_norm",
        "embedding_scale": math.sqrt(config["hidden_dim"]),
    }


def _read1(fields):
    config = _read_shared(fields, "hidden_act", default_key_value_heads=16)
    named = fields.choice("hidden_activation", _ACTIVATIONS, "gelu_new")
    if fields.values.get("hidden_activation") and named != config["activation"]:
        raise ValueError(
            "`hidden_activation` must go with `hidden_act`. Received: "
            f"{quoted(fields.values['hidden_activation'])}"
        )
    return llama_like.with_biases(fields, config)


def _read2(fields):
    config = _read_shared(fields, "hidden_activation")
    config |= _extras(fields, config, 30.0, default_pattern=2)
    config["attention_logit_soft_cap"] = fields.real(
        "attn_logit_softcapping", 50.0, null=None
    )
    return llama_like.with_biases(fields, config, _TENSORS2)


def _read3(fields):
    # transformers reads it and doesn't apply it, so what is meant isn't known.
    fields.must_be("attn_logit_softcapping")
    config = _read_shared(fields, "hidden_activation", default_theta=None)
    pattern = fields.size("_sliding_window_pattern", 6)
    pattern = fields.size("sliding_window_pattern", pattern)
    config |= _extras(fields, config, None, default_pattern=pattern)
    slides = config["sliding_window"] is not None
    config |= _two_rotations(fields, config["head_dim"], slides)
    config["query_key_norm"] = True
    return llama_like.with_biases(fields, config, _TENSORS3)


def _extras(fields, config, default_cap, default_pattern):
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


def _two_rotations(fields, head_dim, slides):
    """As `rope_options`, where layers with a window have a rotation of their own."""
    nested = fields.mapping("rope_parameters")
    if nested and not nested.keys() & {FULL, SLIDING}:
        raise ValueError(
            f"`rope_parameters` must have {quoted(FULL)} and {quoted(SLIDING)}. "
            f"Received: {nested}"
        )
    by_kind = Fields(nested, "rope_parameters.")
    scaling = fields.mapping("rope_scaling")
    every = read_rotation(
        fields,
        {**by_kind.mapping(FULL), **scaling},
        "rope_scaling." if scaling else f"rope_parameters.{FULL}.",
        head_dim,
        fields.real("rope_theta", 1_000_000.0),
    )
    options = as_rope_arguments(every)
    if slides:
        path = f"rope_parameters.{SLIDING}."
        theta = fields.real("rope_local_base_freq", 10_000.0)
        local = read_rotation(fields, by_kind.mapping(SLIDING), path, head_dim, theta)
        if local["frequency_factors"] is not None:
            raise ValueError(
                f"`{path}rope_type` must be default or linear. Received: 'llama3'"
            )
        options["rope_local_max_wavelength"] = local["max_wavelength"]
        options["rope_local_position_scaling_factor"] = local["scaling_factor"]
    return options


def _options(backbone):
    attention = backbone.transformer_layers[0].attention
    slides = backbone.use_sliding_window_attention
    head_dim, width = backbone.head_dim, backbone.hidden_dim // backbone.num_query_heads
    scaled_by = head_dim if attention.query_head_dim_normalize else width
    return dict(
        keras_hub_parts.linear_rope(attention.rope_layer),
        normalization="unit_offset_rms_norm",
        activation="gelu_tanh",
        intermediate_dim=backbone.intermediate_dim // 2,
        head_dim=head_dim,
        embedding_scale=math.sqrt(backbone.hidden_dim),
        query_scale=scaled_by**-0.5,
        attention_logit_soft_cap=backbone.attention_logit_soft_cap,
        sliding_window=backbone.sliding_window_size if slides else None,
        sliding_window_pattern=2 if slides else None,
    )


def _options3(backbone):
    for flag, value in (
        ("vision_encoder", backbone.vision_encoder),
        ("use_bidirectional_attention", backbone.use_bidirectional_attention),
        ("is_embedding_model", backbone.is_embedding_model),
    ):
        if value:
            raise ValueError(
                "`causal_lm` must be a Gemma 3 of text that attends what came before. "
                f"Received: a backbone with {flag}={value}"
            )
    compute_dtype = backbone.transformer_layers[0].compute_dtype
    if compute_dtype == "float16":
        raise ValueError(
            "`causal_lm` must compute in another dtype, as Gemma 3 in float16 is cut "
            "off at the largest number between its parts. Received: "
            f"compute_dtype={compute_dtype!r}"
        )
    options = dict(_options(backbone), intermediate_dim=backbone.intermediate_dim)
    if options["sliding_window"] is None:
        return options
    by_layer = [block.attention for block in backbone.transformer_layers]
    others = [one for one in by_layer if not one.use_sliding_window_attention]
    every = keras_hub_parts.linear_rope((others or by_layer)[0].rope_layer)
    return dict(
        options,
        **every,
        rope_local_max_wavelength=by_layer[0].rope_layer.max_wavelength,
        rope_local_position_scaling_factor=by_layer[0].rope_layer.scaling_factor,
        sliding_window_pattern=6,
    )


def _parts(block):
    """The norms are those that a block has."""
    parts = dict(
        attention_norm=block.pre_attention_norm,
        attention=keras_hub_parts.projections(block.attention),
        feedforward_norm=block.pre_ffw_norm,
        feedforward=dict(
            gate=block.gating_ffw,
            intermediate=block.gating_ffw_2,
            output_dense=block.ffw_linear,
        ),
    )
    if block.use_post_attention_norm:
        parts["post_attention_norm"] = block.post_attention_norm
    if block.use_post_ffw_norm:
        parts["post_ffw_norm"] = block.post_ffw_norm
    if getattr(block, "use_query_key_norm", False):
        parts["query_norm"] = block.attention.query_norm
        parts["key_norm"] = block.attention.key_norm
    return parts


_KNOWS = """
    head_dim query_head_dim_normalize use_post_ffw_norm use_post_attention_norm
    attention_logit_soft_cap final_logit_soft_cap use_sliding_window_attention
    sliding_window_size
""".split()
# The last three are of models that are refused.
_KNOWS3 = """
    use_query_key_norm local_rope_scaling_factor global_rope_scaling_factor
    vision_encoder use_bidirectional_attention is_embedding_model
    image_size pooling_intermediate_dim embedding_dim
""".split()
_BACKBONES = (
    KerasHub("GemmaBackbone", _options, _parts, knows=_KNOWS),
    KerasHub(
        "Gemma3Backbone",
        _options3,
        _parts,
        knows=_KNOWS + _KNOWS3,
        end_of_turn="<end_of_turn>",
    ),
)
FAMILY = Family(
    "Gemma 1 to 3 (text)",
    hugging_face=(
        HuggingFace("gemma", classes("Gemma"), _read1),
        HuggingFace("gemma2", classes("Gemma2"), _read2),
        HuggingFace("gemma3_text", ("Gemma3ForCausalLM", "Gemma3TextModel"), _read3),
    ),
    keras_hub=_BACKBONES,
)
