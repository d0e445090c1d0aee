"""The metadata of a llama-architecture GGUF file as the decoder's arguments."""

from __future__ import annotations

from typing import Any

import numpy as np

from keras_kvcache.errors import quoted
from keras_kvcache.loaders.gguf_header import REQUIRED, Header, get_value

_ARCHITECTURES = ("llama",)
_ROPE_SCALINGS = ("none", "linear")


def read_config(header: Header) -> dict[str, Any]:
    """The JSON-able keyword arguments of the decoder language model.

    `rope_frequency_factors` is left at None: it comes from a tensor.

    Raises:
        ValueError: A key is missing, has the wrong type or asks for what the
            decoder doesn't do. The message names the key and its value.
    """
    metadata = header.metadata
    architecture = get_value(metadata, "general.architecture", str)
    if architecture not in _ARCHITECTURES:
        raise ValueError(
            f"'general.architecture' must be one of {_ARCHITECTURES}. Received: "
            f"{quoted(architecture)}"
        )
    _refuse_variants(metadata)
    D = _positive(metadata, "llama.embedding_length")
    N = _positive(metadata, "llama.attention.head_count")
    K = _positive(metadata, "llama.attention.head_count_kv", N)
    if N % K:
        raise ValueError(
            "'llama.attention.head_count' must be a multiple of "
            f"'llama.attention.head_count_kv'. Received: {N} and {K}"
        )
    if "llama.attention.key_length" not in metadata and D % N:
        raise ValueError(
            "'llama.embedding_length' must be a multiple of "
            f"'llama.attention.head_count'. Received: {D} and {N}"
        )
    H = _positive(metadata, "llama.attention.key_length", D // N)
    if _positive(metadata, "llama.attention.value_length", H) != H:
        raise ValueError(
            "'llama.attention.value_length' must equal the key length "
            f"{H}. Received: {metadata['llama.attention.value_length']}"
        )
    rotary_dim = _positive(metadata, "llama.rope.dimension_count", H)
    if rotary_dim % 2 or rotary_dim > H:
        raise ValueError(
            "'llama.rope.dimension_count' must be even and at most the head size "
            f"{H}. Received: {rotary_dim}"
        )
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ValueError("tensor 'token_embd.weight' must be there, with two axes.")
    config = {
        "vocabulary_size": embedding.shape[0],
        "num_layers": _positive(metadata, "llama.block_count"),
        "num_query_heads": N,
        "num_key_value_heads": K,
        "hidden_dim": D,
        "intermediate_dim": _positive(metadata, "llama.feed_forward_length"),
        "head_dim": H,
        "max_sequence_length": _positive(metadata, "llama.context_length"),
        "layer_norm_epsilon": _real(metadata, "llama.attention.layer_norm_rms_epsilon"),
        "rope_max_wavelength": _real(metadata, "llama.rope.freq_base", 10000.0),
        "rope_position_scaling_factor": _position_scaling(metadata),
        "rope_frequency_factors": None,
        "rotary_dim": None if rotary_dim == H else rotary_dim,
        "use_bias": False,
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "normalization": "rms_norm",
        "activation": "silu",
        "gated_feedforward": True,
        "position_embedding": "rotary",
    }
    if "llama.attention.sliding_window" in metadata:
        config["sliding_window"] = _positive(metadata, "llama.attention.sliding_window")
    # The tensors of every layer are listed before any is looked up, so a bogus
    # count has to be caught here.
    if config["num_layers"] > len(header.tensors):
        raise ValueError(
            f"'llama.block_count' must match the tensors. Received: "
            f"{config['num_layers']} in a file of {len(header.tensors)} tensors"
        )
    return config


def _refuse_variants(metadata: dict[str, Any]) -> None:
    """Raises for kinds of llama files that the decoder doesn't run."""
    experts = get_value(metadata, "llama.expert_count", int, 0)
    if experts > 0:
        raise ValueError(
            "mixtures of experts aren't supported: 'llama.expert_count' must be 0. "
            f"Received: {experts}"
        )
    parts = get_value(metadata, "split.count", int, 1)
    if parts > 1:
        raise ValueError(
            "the model must be in one file: 'split.count' must be at most 1. "
            f"Received: {parts}"
        )


def _position_scaling(metadata: dict[str, Any]) -> float:
    """The divisor of positions before rotation."""
    # A factor without a type means linear, as does the older name of the key.
    kind = get_value(metadata, "llama.rope.scaling.type", str, "linear")
    if kind not in _ROPE_SCALINGS:
        raise ValueError(
            f"'llama.rope.scaling.type' must be one of {_ROPE_SCALINGS}. Received: "
            f"{quoted(kind)}"
        )
    if kind == "none":
        return 1.0
    older = _real(metadata, "llama.rope.scale_linear", 1.0)
    return _real(metadata, "llama.rope.scaling.factor", older)


def _positive(metadata: dict[str, Any], key: str, default: Any = REQUIRED) -> int:
    value = get_value(metadata, key, int, default)
    if value < 1:
        raise ValueError(f"{quoted(key)} must be at least 1. Received: {value}")
    return value


def _real(metadata: dict[str, Any], key: str, default: Any = REQUIRED) -> float:
    value = get_value(metadata, key, float, default)
    if not (value > 0 and np.isfinite(value)):
        raise ValueError(
            f"{quoted(key)} must be a positive finite number. Received: {value}"
        )
    # The file holds float32: 1e-5 would read 9.999999747378752e-06 elsewhere.
    return float(str(np.float32(value)))
