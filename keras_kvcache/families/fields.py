"""The values of a `config.json`, checked as they are read."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any

from keras_kvcache.errors import quoted

_REQUIRED = object()
# By the names that transformers has for them.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


class Fields:
    """The values of a `config.json`, checked as they are read.

    A value of `null` stands for the default unless said otherwise.

    Args:
        values: By key.
        path: Before the keys in messages, such as `"rope_scaling."`.

    Attributes:
        values: As given.
    """

    def __init__(self, values: Mapping[str, Any], path: str = ""):
        self.values = values
        self._path = path

    def size(self, key: str, default: Any = _REQUIRED, null: Any = _REQUIRED) -> Any:
        """A positive integer; a value of `null` becomes the argument `null`."""
        value, is_given = self._get(key, default, null)
        if is_given and not (_is_number(value, numbers.Integral) and value > 0):
            raise self._error(key, "a positive integer", value)
        return value

    def real(self, key: str, default: Any = _REQUIRED, null: Any = _REQUIRED) -> Any:
        """A positive finite number."""
        value, is_given = self._get(key, default, null)
        if not is_given:
            return value
        is_real = _is_number(value, numbers.Real) and math.isfinite(value)
        if not is_real or value <= 0:
            raise self._error(key, "a positive finite number", value)
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value, _ = self._get(key, default)
        if not isinstance(value, bool):
            raise self._error(key, "true or false", value)
        return value

    def choice(self, key: str, choices: Mapping[str, str], default: str) -> str:
        """The meaning of a name that must be one of `choices`."""
        value, _ = self._get(key, default)
        if not isinstance(value, str) or value not in choices:
            raise self._error(key, f"one of {', '.join(choices)}", value)
        return choices[value]

    def must_be(self, key: str, *allowed: Any) -> None:
        """Refuses a value that the decoder can't express; an absent one passes."""
        value = self.values.get(key)
        if value is not None and value not in allowed:
            raise self._error(key, " or ".join(map(repr, allowed)) or "absent", value)

    def mapping(self, key: str) -> dict[str, Any]:
        """An object, empty if it is absent or `null`."""
        value, _ = self._get(key, {})
        if not isinstance(value, dict):
            raise self._error(key, "an object or null", value)
        return value

    def _get(self, key, default, null=_REQUIRED):
        """The value, or its default if absent; and whether it was given."""
        if key not in self.values:
            if default is _REQUIRED:
                raise ValueError(f"`{self._path}{key}` must be given. Received: none")
            return default, False
        value = self.values[key]
        if value is not None:
            return value, True
        instead = default if null is _REQUIRED else null
        if instead is _REQUIRED:
            raise self._error(key, "given", value)
        return instead, False

    def _error(self, key, rule, value):
        return ValueError(
            f"`{self._path}{key}` must be {rule}. Received: {quoted(value)}"
        )


def _is_number(value, kind):
    return isinstance(value, kind) and not isinstance(value, bool)
