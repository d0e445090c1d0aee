"""Which layers have a window, by a `config.json`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from keras_kvcache.errors import quoted
from keras_kvcache.families.fields import Fields

SLIDING, FULL = "sliding_attention", "full_attention"


def window_options(
    window: int | None, types: Sequence[str], key: str, value: Any
) -> dict[str, Any]:
    """Arguments of the decoder that say which layers have a window.

    Args:
        window: `W`, or `None`.
        types: Of each layer, `"sliding_attention"` or `"full_attention"`.
        key: What `types` follows from in the config.
        value: Its value there.

    Raises:
        ValueError: The decoder can't have windows in just these layers.
    """
    sliding = [kind == SLIDING for kind in types]
    if not any(sliding):
        is_known = all(kind == FULL for kind in types)
        options = {"sliding_window": None, "sliding_window_pattern": None}
    else:
        if window is None:
            raise ValueError(
                "`sliding_window` must be a positive integer where layers slide. "
                "Received: null or switched off"
            )
        pattern = None if all(sliding) else sliding.index(False) + 1
        is_known = all(
            kind == (FULL if pattern and i % pattern == 0 else SLIDING)
            for i, kind in enumerate(types, 1)
        )
        options = {"sliding_window": window, "sliding_window_pattern": pattern}
    if not is_known:
        raise ValueError(
            f"`{key}` must give a window to all layers, to none, or to all but every "
            f"n-th. Received: {quoted(value)}"
        )
    return options


def layer_types(fields: Fields, slides: Sequence[bool]) -> list[str]:
    """Reads `layer_types`; where it is absent, `slides` stands for it."""
    types = fields.values.get("layer_types")
    if types is None:
        return [SLIDING if one else FULL for one in slides]
    is_list = isinstance(types, list) and all(isinstance(one, str) for one in types)
    if not is_list or len(types) != len(slides):
        raise ValueError(
            f"`layer_types` must be a list of {len(slides)} names. Received: "
            f"{quoted(types)}"
        )
    return types
