"""The result of every loader: a configuration, weights by name, a tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from keras_kvcache.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk, described without building it.

    Attributes:
        config: JSON-able keyword arguments of the decoder language model.
        weights: For each weight of the model, by its name, a function that
            reads that one tensor and returns it as a float32 array in the
            layout Keras uses. Nothing is read before the call, so a caller
            that assigns one weight after the other holds one at a time.
        tokenizer: The tokenizer the model was trained with; `None` if there is none
            beside it.
    """

    config: dict[str, Any]
    weights: Mapping[str, Callable[[], np.ndarray]]
    tokenizer: Tokenizer | None
