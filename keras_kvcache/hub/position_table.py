"""keras-hub's learned positions, called as `keras.layers.Embedding` is."""

from typing import Any

import keras
from keras import ops


class PositionTable(keras.layers.Layer):
    """Looks positions up in a `keras_hub.layers.PositionEmbedding`.

    Args:
        position_embedding: That layer, built. Called by itself it gives whole
            sequences that begin at one position.

    Call arguments:
        positions: Integer tensor `(1 | B, T)`.

    Returns:
        A tensor `(1 | B, T, D)`.
    """

    def __init__(self, position_embedding):
        super().__init__(dtype=position_embedding.dtype_policy)
        self.position_embedding = position_embedding
        self.built = True

    @property
    def embeddings(self) -> Any:
        """The table, `(positions, D)`."""
        return self.position_embedding.position_embeddings

    def call(self, positions):
        """Embeddings `(…, D)` of int32 positions `(…)`."""
        return ops.take(ops.convert_to_tensor(self.embeddings), positions, axis=0)
