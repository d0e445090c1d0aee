"""The metadata of a GGUF file, checked as it is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from keras_kvcache.errors import quoted

REQUIRED = object()


def get_value(
    metadata: Mapping[str, Any], key: str, kind: type, default: Any = REQUIRED
) -> Any:
    """The metadata value of a key, whose type is checked.

    Raises:
        ValueError: The value isn't a `kind`, or is missing and has no default.
    """
    value = metadata.get(key, default)
    if value is REQUIRED:
        raise ValueError(
            f"the metadata must have the key {quoted(key)}. Received: metadata "
            "without it"
        )
    # Not isinstance: a bool is no number here. A default may be None.
    if type(value) is not kind and value is not default:
        found = repr(value)
        raise ValueError(
            f"{quoted(key)} must be of type {kind.__name__}. Received: {found[:60]}"
        )
    return value


class Keys:
    """The values that a GGUF file has under the name of its architecture.

    Args:
        metadata: All values, by key.
        shapes: Shapes of the tensors, by name.
        architecture: What the keys begin with.

    Attributes:
        shapes: As given.
    """

    def __init__(
        self,
        metadata: Mapping[str, Any],
        shapes: Mapping[str, tuple[int, ...]],
        architecture: str,
    ):
        self.shapes = shapes
        self._metadata, self._architecture = metadata, architecture

    def __contains__(self, key: str) -> bool:
        return self.named(key) in self._metadata

    def __getitem__(self, key: str) -> Any:
        return self._metadata[self.named(key)]

    def named(self, key: str) -> str:
        """The whole name of a key."""
        return f"{self._architecture}.{key}"

    def get(self, key: str, kind: type, default: Any = REQUIRED) -> Any:
        """A value of a type; see `get_value`."""
        return get_value(self._metadata, self.named(key), kind, default)

    def size(self, key: str, default: Any = REQUIRED) -> int:
        """A positive integer."""
        value = self.get(key, int, default)
        if value < 1:
            raise self.error(key, "be at least 1", value)
        return value

    def real(self, key: str, default: Any = REQUIRED) -> float:
        """A positive finite number."""
        value = self.get(key, float, default)
        if not (value > 0 and np.isfinite(value)):
            raise self.error(key, "be a positive finite number", value)
        # The file holds float32: 1e-5 would read 9.999999747378752e-06 elsewhere.
        return float(str(np.float32(value)))

    def error(self, key: str, rule: str, received: Any) -> ValueError:
        """An error that says what a key's value must do."""
        return ValueError(f"'{self.named(key)}' must {rule}. Received: {received}")
