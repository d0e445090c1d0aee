"""Llama 1 to 3 (Touvron et al., 2023, https://arxiv.org/abs/2302.13971).

SmolLM2 is one, and many a Mistral is stored as one in GGUF.
"""

from dataclasses import replace

from keras_kvcache.attention.rotary import llama3_frequency_factors
from keras_kvcache.families import keras_hub_parts, llama_like
from keras_kvcache.families.family import Family, Gguf, HuggingFace, KerasHub, classes


def _read(fields):
    fields.must_be("sliding_window")
    return llama_like.with_biases(fields, llama_like.read_fields(fields))


def _read_keys(keys):
    # The converter of llama.cpp permutes the rows of queries and keys.
    names = replace(llama_like.GGUF_TENSORS, interleaved=True)
    return llama_like.read_keys(keys), names


def _options(backbone):
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


_KNOWS = """
    rope_max_wavelength rope_position_scaling_factor rope_frequency_adjustment_factor
    rope_low_freq_factor rope_high_freq_factor rope_pretraining_sequence_length
    tie_word_embeddings
""".split()
_HUB = (_options, keras_hub_parts.llama_decoder)
FAMILY = Family(
    "Llama",
    hugging_face=(HuggingFace("llama", classes("Llama"), _read),),
    gguf=(Gguf("llama", _read_keys),),
    keras_hub=(
        KerasHub("LlamaBackbone", *_HUB, knows=_KNOWS),
        KerasHub("Llama3Backbone", *_HUB, knows=_KNOWS),
    ),
)
