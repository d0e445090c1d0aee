"""JSON files of which an object is expected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from keras_kvcache.errors import shortened


def read_json(path: Path, default: dict[str, Any] | None = None) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        path: Of the file.
        default: What an absent file stands for; `None` if it has to be there.

    Raises:
        FileNotFoundError: The file is absent and there is no default.
        ValueError: It holds anything but a JSON object.
    """
    if default is not None and not path.exists():
        return default
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON: {shortened(error, 500)}") from error
    if not isinstance(value, dict):
        raise ValueError(
            f"{path} must be JSON of an object. Received: {type(value).__name__}"
        )
    return value
