"""Weight files in which another attention layer stands in the place of ours."""

import re
from typing import Any

import keras

# By the name of their groups in a file, which Keras makes of the class.
_LAYERS = {
    "multi_head_attention": "MultiHeadAttention",
    "grouped_query_attention": "GroupQueryAttention",
}
_OWN = re.compile(r"cached_multi_head_attention(_\d+)?$")


class ExplainsForeignFiles(keras.layers.Layer):
    """A layer that refuses another attention layer's file, and says how to load it.

    In a functional model Keras looks for a layer's weights under the name of its class
    and its number among layers of that class. So a file of a model with Keras' own
    attention has none for ours, and only such a model can load it.
    """

    def load_own_variables(self, store: Any) -> None:
        """Reads the layer's weights; its sublayers read their own.

        Args:
            store: What Keras opened the file as.

        Raises:
            ValueError: The file has weights of another attention layer instead.
        """
        # Keras tells a layer its place in the file in this attribute only.
        path = getattr(store, "_h5_entry_path", None) or ""
        for group, name in _LAYERS.items():
            other = _OWN.sub(group, path)
            if other != path and not store.has_path(path) and store.has_path(other):
                raise ValueError(
                    "The file must be of a model with `CachedMultiHeadAttention` in "
                    f"this place. Received: one with `keras.layers.{name}`. Load it "
                    "into a model built with that layer, as `theirs`, or a .keras file "
                    "by `theirs = keras.saving.load_model(path)`; then "
                    "`model.set_weights(theirs.get_weights())` copies all weights, "
                    "whose order and shapes are the same"
                )
        super().load_own_variables(store)
