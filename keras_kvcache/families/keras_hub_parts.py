"""Parts of blocks and rotations that several families of keras-hub share.

keras-hub writes each family down anew, and the names of its parts differ by family.
A family's numbers are read from the layers that use them, as a backbone doesn't hand
all of its own on: Gemma's blocks don't know of its `layer_norm_epsilon`.
"""

from __future__ import annotations

from typing import Any

PROJECTIONS = ("query_dense", "key_dense", "value_dense", "output_dense")


def projections(attention: Any, prefix: str = "") -> dict[str, Any]:
    """The four projections of an attention layer, whose names begin with a prefix."""
    return {name: getattr(attention, prefix + name) for name in PROJECTIONS}


def transformer_decoder(block: Any) -> dict[str, Any]:
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


def attending_decoder(block: Any) -> dict[str, Any]:
    """Parts of a `keras_hub.layers.TransformerDecoder` that attends an encoder."""
    return dict(
        transformer_decoder(block),
        cross_attention_norm=block._cross_attention_layer_norm,
        cross_attention=projections(block._cross_attention_layer, "_"),
    )


def llama_decoder(block: Any) -> dict[str, Any]:
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


def attention_of(backbone: Any) -> Any:
    """The attention of the first block, as Llama's block calls it."""
    return backbone.transformer_layers[0]._self_attention_layer


def linear_rope(rotary: Any) -> dict[str, float]:
    """Arguments of the decoder that equal a `keras_hub.layers.RotaryEmbedding`."""
    return dict(
        rope_max_wavelength=rotary.max_wavelength,
        rope_position_scaling_factor=rotary.scaling_factor,
    )


def windowed_options(backbone: Any) -> dict[str, Any]:
    """Arguments of the decoder that equal a backbone of Mistral or Mixtral."""
    attention = attention_of(backbone)
    return dict(
        linear_rope(attention.rotary_embedding_layer),
        head_dim=attention._head_dim,
        sliding_window=backbone.sliding_window,
    )
