"""keras-hub's families, as options of `DecoderLM`.

A family is a function of a backbone that gives options of `DecoderLM`, and one of a
block that gives its parts. Sizes that all backbones name alike, and what the parts
tell by themselves, such as biases and epsilons, is read in `convert`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from keras_kvcache.attention.rotary import llama3_frequency_factors
from keras_kvcache.hub import parts

# Arguments of backbones that make a difference here, or to training alone. One that is
# new to keras-hub may change numbers in ways that nobody here has heard of.
OPTIONS = frozenset(
    """
    attention_logit_soft_cap dropout dtype embedding_dim final_logit_soft_cap
    global_rope_scaling_factor head_dim hidden_dim image_size intermediate_dim
    is_embedding_model layer_norm_epsilon local_rope_scaling_factor
    max_decoder_sequence_length max_encoder_sequence_length max_sequence_length name
    num_experts num_heads num_key_value_heads num_layers num_mels num_query_heads
    pooling_intermediate_dim pretraining_sequence_length query_head_dim_normalize
    rope_frequency_adjustment_factor rope_high_freq_factor rope_low_freq_factor
    rope_max_wavelength rope_position_scaling_factor rope_pretraining_sequence_length
    rope_scaling_factor rope_scaling_long_factor rope_scaling_short_factor
    rope_scaling_type router_aux_loss_coef router_jitter_noise sliding_window
    sliding_window_size tie_word_embeddings top_k trainable use_bidirectional_attention
    use_post_attention_norm use_post_ffw_norm use_query_key_norm
    use_sliding_window_attention vision_encoder vocabulary_size
    """.split()
)


class Family(NamedTuple):
    """How a backbone is read."""

    options: Callable  # backbone -> options of `DecoderLM`
    block_parts: Callable  # block -> what a `DecoderBlock` adopts
    end_of_turn: str | None = None  # what ends an answer besides the end token


def _gpt2(backbone):
    return dict(
        normalization="layer_norm",
        activation="gelu_tanh",
        gated_feedforward=False,
        position_embedding="learned",
        max_sequence_length=backbone.max_sequence_length,
    )


def _opt(backbone):
    return dict(_gpt2(backbone), activation="relu")


def _llama(backbone):
    # Its `rope_position_scaling_factor` is kept, but keras-hub doesn't scale by it.
    max_wavelength, factors = backbone.rope_max_wavelength, None
    if backbone.rope_frequency_adjustment_factor is not None:
        factors = llama3_frequency_factors(
            backbone.hidden_dim // backbone.num_query_heads,
            max_wavelength,
            backbone.rope_frequency_adjustment_factor,
            backbone.rope_low_freq_factor,
            backbone.rope_high_freq_factor,
            backbone.rope_pretraining_sequence_length,
        )
    return dict(rope_max_wavelength=max_wavelength, rope_frequency_factors=factors)


def _mistral(backbone):
    return dict(
        _linear_rope(_attention(backbone).rotary_embedding_layer),
        head_dim=_attention(backbone)._head_dim,
        sliding_window=backbone.sliding_window,
    )


def _mixtral(backbone):
    return dict(
        _mistral(backbone),
        num_experts=backbone.num_experts,
        num_experts_per_token=backbone.top_k,
    )


def _phi3(backbone):
    rotary = backbone.transformer_layers[0].attention.rotary_embedding_layer
    options = _linear_rope(rotary)
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


def _qwen(backbone):
    window = backbone.sliding_window_size
    if not backbone.use_sliding_window_attention:
        window = None
    return dict(
        _linear_rope(_attention(backbone).rotary_embedding_layer),
        sliding_window=parts.unfused_window(_attention(backbone), window),
    )


def _qwen3(backbone):
    window = backbone.sliding_window_size or None
    return dict(
        _linear_rope(_attention(backbone).rotary_embedding_layer),
        head_dim=_attention(backbone).head_dim,
        sliding_window=parts.unfused_window(_attention(backbone), window),
    )


def _gemma(backbone):
    attention = backbone.transformer_layers[0].attention
    slides = backbone.use_sliding_window_attention
    head_dim, width = backbone.head_dim, backbone.hidden_dim // backbone.num_query_heads
    scaled_by = head_dim if attention.query_head_dim_normalize else width
    return dict(
        _linear_rope(attention.rope_layer),
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


def _gemma3(backbone):
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
    options = dict(_gemma(backbone), intermediate_dim=backbone.intermediate_dim)
    if options["sliding_window"] is None:
        return options
    by_layer = [block.attention for block in backbone.transformer_layers]
    others = [one for one in by_layer if not one.use_sliding_window_attention]
    every = _linear_rope((others or by_layer)[0].rope_layer)
    return dict(
        options,
        **every,
        rope_local_max_wavelength=by_layer[0].rope_layer.max_wavelength,
        rope_local_position_scaling_factor=by_layer[0].rope_layer.scaling_factor,
        sliding_window_pattern=6,
    )


def _attention(backbone):
    return backbone.transformer_layers[0]._self_attention_layer


def _linear_rope(rotary):
    return dict(
        rope_max_wavelength=rotary.max_wavelength,
        rope_position_scaling_factor=rotary.scaling_factor,
    )


FAMILIES = {
    "GPT2Backbone": Family(_gpt2, parts.transformer_decoder),
    "OPTBackbone": Family(_opt, parts.transformer_decoder),
    "LlamaBackbone": Family(_llama, parts.llama_decoder),
    "Llama3Backbone": Family(_llama, parts.llama_decoder),
    "MistralBackbone": Family(_mistral, parts.llama_decoder),
    "MixtralBackbone": Family(_mixtral, parts.mixtral_decoder),
    "Phi3Backbone": Family(_phi3, parts.phi3_decoder, "<|end|>"),
    "QwenBackbone": Family(_qwen, parts.llama_decoder),
    "Qwen3Backbone": Family(_qwen3, parts.qwen3_decoder),
    "GemmaBackbone": Family(_gemma, parts.gemma_decoder),
    "Gemma3Backbone": Family(_gemma3, parts.gemma_decoder, "<end_of_turn>"),
}
