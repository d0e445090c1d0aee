"""Mistral (Jiang et al., 2023, https://arxiv.org/abs/2310.06825)."""

from keras_kvcache.families import keras_hub_parts, llama_like
from keras_kvcache.families.family import Family, HuggingFace, KerasHub, classes


def _read(fields):
    config = llama_like.read_fields(fields, default_key_value_heads=8)
    config |= llama_like.one_window(fields, config["num_layers"], 4096)
    return config, llama_like.TENSORS


_BACKBONE = KerasHub(
    "MistralBackbone",
    keras_hub_parts.windowed_options,
    keras_hub_parts.llama_decoder,
    knows="rope_max_wavelength rope_scaling_factor sliding_window head_dim".split(),
)
FAMILY = Family(
    "Mistral",
    hugging_face=(HuggingFace("mistral", classes("Mistral"), _read),),
    keras_hub=(_BACKBONE,),
)
