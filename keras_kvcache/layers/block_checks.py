"""Checks of the decoder block's arguments."""

from typing import Any


def check_encoder(has_encoder: bool, **arguments: Any) -> None:
    """Refuses arguments of cross-attention where there is none, or their lack.

    Args:
        has_encoder: Whether the block was built with an encoder.
        **arguments: Those of the block's call that are about one.

    Raises:
        ValueError: One is given for nothing, or there is nothing to attend.
    """
    given = [name for name, value in arguments.items() if value is not None]
    if not has_encoder and given:
        raise ValueError(
            "This block was built without an encoder, so it has no use for "
            f"`{given[0]}`. Received: {', '.join(given)}"
        )
    if has_encoder and not {"encoder_sequence", "cross_attention_cache"} & set(given):
        raise ValueError(
            "This block was built with an encoder, so it needs `encoder_sequence` "
            f"or `cross_attention_cache`. Received: {', '.join(given) or 'neither'}"
        )
