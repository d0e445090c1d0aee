"""Phi-3 (Abdin et al., 2024, https://arxiv.org/abs/2404.14219)."""

from keras_kvcache.families.family import Family, HuggingFace, KerasHub, classes
from keras_kvcache.families.keras_hub_parts import linear_rope, projections
from keras_kvcache.families.llama_like import (
    TENSORS,
    one_window,
    read_fields,
    with_parts,
)
from keras_kvcache.families.rope_fields import rope_options

_FUSED = {
    "attention/query": "self_attn.qkv_proj",
    "attention/key": "self_attn.qkv_proj",
    "attention/value": "self_attn.qkv_proj",
    "feedforward/gate": "mlp.gate_up_proj",
    "feedforward/intermediate": "mlp.gate_up_proj",
}


def _read(fields):
    config = read_fields(fields, default_epsilon=1e-5)
    config |= rope_options(fields, config["head_dim"], 10_000.0, may_be_partial=True)
    config |= one_window(fields, config["num_layers"])
    return config, with_parts(TENSORS, _FUSED)


def _options(backbone):
    rotary = backbone.transformer_layers[0].attention.rotary_embedding_layer
    options = linear_rope(rotary)
    if backbone.rope_scaling_type is None:
        return options
    # Within the length of the pretraining the short factors hold; past it keras-hub
    # rotates new entries by the long ones, against old entries by the short ones.
    head_dim = backbone.hidden_dim // backbone.num_query_heads
    return dict(
        options,
        rope_frequency_factors=rotary.inverese_freq_short_factor,
        query_scale=head_dim**-0.5 * rotary.embedding_scaling_factor**2,
        max_sequence_length=backbone.pretraining_sequence_length,
    )


def _parts(block):
    # What it calls the norm after attention is the one before the feed-forward part.
    return dict(
        attention_norm=block.pre_attention_layernorm,
        attention=projections(block.attention),
        feedforward_norm=block.post_attention_layernorm,
        feedforward=dict(
            gate=block.feedforward_gate_dense,
            intermediate=block.feedforward_intermediate_dense,
            output_dense=block.feedforward_output_dense,
        ),
    )


FAMILY = Family(
    "Phi-3",
    hugging_face=(HuggingFace("phi3", classes("Phi3"), _read),),
    keras_hub=(
        KerasHub(
            "Phi3Backbone",
            _options,
            _parts,
            knows=(
                "pretraining_sequence_length",
                "rope_max_wavelength",
                "rope_scaling_type",
                "rope_scaling_short_factor",
                "rope_scaling_long_factor",
            ),
            end_of_turn="<|end|>",
        ),
    ),
)
