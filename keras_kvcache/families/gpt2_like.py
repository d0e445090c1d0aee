"""Learned positions and layer norms, as GPT-2 and OPT share them."""

from __future__ import annotations

from typing import Any


def learned_positions(D: int, N: int, F: int, **others: Any) -> dict[str, Any]:
    """Arguments of the decoder.

    Args:
        D, N, F: Width, heads and width of the feed-forward part.
        **others: More arguments, which are passed on.

    Raises:
        ValueError: Heads don't divide the width.
    """
    if D % N:
        raise ValueError(
            "The width must be a multiple of the number of heads. Received: "
            f"{D} and {N}"
        )
    return {
        "num_query_heads": N,
        "num_key_value_heads": N,
        "hidden_dim": D,
        "intermediate_dim": F,
        "head_dim": D // N,
        "normalization": "layer_norm",
        "gated_feedforward": False,
        "position_embedding": "learned",
        **others,
    }


def backbone_options(backbone: Any, activation: str) -> dict[str, Any]:
    """Arguments of the decoder that equal a backbone of keras-hub's."""
    return dict(
        normalization="layer_norm",
        activation=activation,
        gated_feedforward=False,
        position_embedding="learned",
        max_sequence_length=backbone.max_sequence_length,
    )
