"""Mistral (Jiang et al., 2023, https://arxiv.org/abs/2310.06825)."""

from keras_kvcache.families.family import Family, HuggingFace, KerasHub, classes
from keras_kvcache.families.keras_hub_parts import (
    attention_of,
    linear_rope,
    llama_decoder,
)
from keras_kvcache.families.llama_like import TENSORS, one_window, read_fields
from keras_kvcache.families.rope_fields import rope_options


def _read(fields):
    config = read_fields(fields, default_groups=8)
    config |= rope_options(fields, config["head_dim"], 10_000.0)
    return config | one_window(fields, config["num_layers"], 4096), TENSORS


def _options(backbone):
    attention = attention_of(backbone)
    return dict(
        linear_rope(attention.rotary_embedding_layer),
        head_dim=attention._head_dim,
        sliding_window=backbone.sliding_window,
    )


FAMILY = Family(
    "Mistral",
    hugging_face=(HuggingFace("mistral", classes("Mistral"), _read),),
    keras_hub=(
        KerasHub(
            "MistralBackbone",
            _options,
            llama_decoder,
            knows=(
                "rope_max_wavelength",
                "rope_scaling_factor",
                "sliding_window",
                "head_dim",
            ),
        ),
    ),
)
