"""Which layers of keras-hub are which parts of our blocks.

keras-hub writes each family down anew, and the names of its parts differ by family.
A family's numbers are read from the layers that use them, as a backbone doesn't hand
all of its own on: Gemma's blocks don't know of its `layer_norm_epsilon`.
"""

import sys

from keras_kvcache.hub.expert_bank import ExpertBank
from keras_kvcache.hub.head_projections import HeadProjection, OutputProjection

PROJECTIONS = ("query_dense", "key_dense", "value_dense", "output_dense")


def projections(attention, prefix=""):
    """The four projections of an attention layer."""
    found = {name: getattr(attention, prefix + name) for name in PROJECTIONS}
    return dict(found, output_dense=OutputProjection(found["output_dense"]))


def transformer_decoder(block):
    """Parts of `keras_hub.layers.TransformerDecoder`."""
    return dict(
        attention_norm=block._self_attention_layer_norm,
        attention=projections(block._self_attention_layer, "_"),
        feedforward_norm=block._feedforward_layer_norm,
        feedforward=dict(
            intermediate=block._feedforward_intermediate_dense,
            output_dense=block._feedforward_output_dense,
        ),
    )


def attending_decoder(block):
    """Parts of a `keras_hub.layers.TransformerDecoder` that attends an encoder."""
    return dict(
        transformer_decoder(block),
        cross_attention_norm=block._cross_attention_layer_norm,
        cross_attention=projections(block._cross_attention_layer, "_"),
    )


def llama_decoder(block):
    """Parts of the block of Llama, Mistral and Qwen."""
    return dict(
        attention_norm=block._self_attention_layernorm,
        attention=projections(block._self_attention_layer, "_"),
        feedforward_norm=block._feedforward_layernorm,
        feedforward=dict(
            gate=block._feedforward_gate_dense,
            intermediate=block._feedforward_intermediate_dense,
            output_dense=block._feedforward_output_dense,
        ),
    )


def qwen3_decoder(block):
    """Parts of Qwen 3's block, which normalizes queries and keys."""
    attention = block._self_attention_layer
    return dict(
        llama_decoder(block),
        query_norm=attention._query_dense_layer_norm,
        key_norm=attention._key_dense_layer_norm,
    )


def mixtral_decoder(block):
    """Parts of Mixtral's block, whose feed-forward part is made of experts."""
    mixture = block._sparse_moe_block
    return dict(
        attention_norm=block._self_attention_layernorm,
        attention=projections(block._self_attention_layer),
        feedforward_norm=block._feedforward_layernorm,
        feedforward=dict(
            router=mixture._sparse_feedforward_gate_dense,
            experts=ExpertBank(mixture.expert_bank),
        ),
    )


def phi3_decoder(block):
    """Parts of Phi-3's block. What it calls the norm after attention is the one
    before the feed-forward part.
    """
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


def gemma_decoder(block):
    """Parts of the block of Gemma, Gemma 2 and Gemma 3, with the norms it has."""
    attention = projections(block.attention)
    for name in ("query_dense", "key_dense", "value_dense"):
        attention[name] = HeadProjection(attention[name])
    parts = dict(
        attention_norm=block.pre_attention_norm,
        attention=attention,
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


def unfused_window(attention, sliding_window):
    """The window of an attention layer that has one outside of fused kernels only.

    Qwen's layers pass it over wherever there is a fused kernel, as there always is
    on JAX. The numbers are to be those of the model at hand, so we do as it does.
    """
    module = sys.modules[type(attention).__module__]
    return None if module.fused_attention_op_available() else sliding_window
