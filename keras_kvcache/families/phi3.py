"""Phi-3 (Abdin et al., 2024, https://arxiv.org/abs/2404.14219)."""

from dataclasses import replace

from keras_kvcache.families import keras_hub_parts, llama_like
from keras_kvcache.families.family import Family, HuggingFace, KerasHub, classes

_PARTS = {
    **llama_like.PARTS,
    **dict.fromkeys(("attention/query", "attention/key"), "self_attn.qkv_proj"),
    "attention/value": "self_attn.qkv_proj",
    "feedforward/gate": "mlp.gate_up_proj",
    "feedforward/intermediate": "mlp.gate_up_proj",
}


def _read(fields):
    config = llama_like.read_fields(
        fields, default_epsilon=1e-5, may_rotate_partly=True
    )
    config |= llama_like.one_window(fields, config["num_layers"])
    return config, replace(llama_like.TENSORS, parts=_PARTS)


def _options(backbone):
    rotary = backbone.transformer_layers[0].attention.rotary_embedding_layer
    options = keras_hub_parts.linear_rope(rotary)
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


def _block_parts(block):
    # The one that it calls the norm after attention is before the feed-forward part.
    return dict(
        attention_norm=block.pre_attention_layernorm,
        attention=keras_hub_parts.projections(block.attention),
        feedforward_norm=block.post_attention_layernorm,
        feedforward=dict(
            gate=block.feedforward_gate_dense,
            intermediate=block.feedforward_intermediate_dense,
            output_dense=block.feedforward_output_dense,
        ),
    )


_BACKBONE = KerasHub(
    "Phi3Backbone",
    _options,
    _block_parts,
    knows="""
        pretraining_sequence_length rope_max_wavelength rope_scaling_type
        rope_scaling_short_factor rope_scaling_long_factor
    """.split(),
    end_of_turn="<|end|>",
)
FAMILY = Family(
    "Phi-3",
    hugging_face=(HuggingFace("phi3", classes("Phi3"), _read),),
    keras_hub=(_BACKBONE,),
)
