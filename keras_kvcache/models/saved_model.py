"""Models with a tokenizer, and perhaps with layers of another model, in files."""

import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import keras

from keras_kvcache.layers.adoption import AdoptsParts
from keras_kvcache.layers.quantization import KEY as QUANTIZATION
from keras_kvcache.models.exporting import export_signature
from keras_kvcache.models.tokenizer_files import (
    load_tokenizer,
    reduce_beside,
    save_unless_beside,
)


class SavedModel(AdoptsParts, keras.Model):
    """A Keras model that is saved, exported, pickled and copied with its tokenizer.

    If it shares layers with a keras-hub model, that model reads weight files: their
    weights may lie otherwise than those of layers made here.

    Args:
        tokenizer: Object with `encode`, `decode` and `stop_token_ids`, or `None`.
        parts: Layers of another model, by the names of this model's attributes, blocks
            as `"block_0"`, `"block_1"` and so on: each a built layer, or a dictionary
            of what the layer of that name adopts. `None` for none.
        **kwargs: Arguments of `keras.Model`.

    Attributes:
        tokenizer: As above; it may be set anew at any time.
    """

    tokenizer: Any
    # What to do with a model that can't be saved because it shares layers.
    _saved_by = "save the keras-hub model"

    def __init__(
        self, tokenizer: Any = None, parts: Mapping | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.tokenizer = tokenizer
        # A proxy, which Keras doesn't track: layers are tracked where they are used.
        self._parts = MappingProxyType(dict(parts or {}))

    @property
    def call_inputs(self) -> Any:
        """Symbolic inputs of `call`, with their names, shapes and dtypes."""
        raise NotImplementedError

    def get_config(self) -> dict[str, Any]:
        """Constructor arguments, the tokenizer and what is shared excepted.

        How shared layers are quantized is theirs: their names are another model's.
        """
        config = super().get_config()
        if self._parts:
            config.pop(QUANTIZATION, None)
        return config

    def _to_save(self):
        """The model that is written in the place of this one: itself, if it can be.

        Raises:
            ValueError: It shares layers.
        """
        if self._parts:
            raise ValueError(
                "A model that shares the layers of a keras-hub model must be saved by "
                f"that model. Received: {self.name}"
            )
        return self

    def save(self, *args: Any, **kwargs: Any) -> None:
        """As `keras.Model.save`; layers that are shared are written as own ones."""
        keras.Model.save(self._to_save(), *args, **kwargs)

    def save_weights(self, *args: Any, **kwargs: Any) -> None:
        """As `keras.Model.save_weights`, in the layout of a model with own layers."""
        keras.Model.save_weights(self._to_save(), *args, **kwargs)

    def save_own_variables(self, store: Any) -> None:
        """As in Keras; a model that shares layers can't be part of another's file.

        Raises:
            ValueError: It shares layers.
        """
        if self._parts:
            raise ValueError(
                "A model that shares the layers of a keras-hub model can't be saved as "
                f"part of another. Received: {self.name}; {self._saved_by}"
            )
        super().save_own_variables(store)

    def load_weights(
        self, filepath: str | os.PathLike, *args: Any, **kwargs: Any
    ) -> Any:
        """As `keras.Model.load_weights`.

        Raises:
            ValueError: The model shares layers.
        """
        if self._parts:
            raise ValueError(
                "Weights must be loaded by the keras-hub model whose layers this one "
                f"shares; it sees them at once. Received: filepath={filepath!r}"
            )
        return super().load_weights(filepath, *args, **kwargs)

    def save_assets(self, directory: str | os.PathLike) -> None:
        """Writes the tokenizer into the folder that Keras gives the model's files.

        Args:
            directory: Path of the folder.
        """
        save_unless_beside(self.tokenizer, directory)

    def load_assets(self, directory: str | os.PathLike) -> None:
        """Reads what `save_assets` wrote.

        Args:
            directory: Path of the folder; `None` if there is none.
        """
        tokenizer = None if directory is None else load_tokenizer(directory)
        if tokenizer is not None:
            self.tokenizer = tokenizer

    def __reduce__(self):
        """Pickles and copies the model as Keras' file, and the tokenizer itself."""
        model = self._to_save()
        return reduce_beside(super(SavedModel, model).__reduce__, model.tokenizer)

    def export(
        self,
        filepath: str | os.PathLike,
        *args: Any,
        input_signature: Any = None,
        **kwargs: Any,
    ) -> None:
        """As `keras.Model.export`; the model needn't have been called before.

        Args:
            filepath: Where to write.
            *args: Other arguments of `keras.Model.export`.
            input_signature: As there; `None` for integers of any batch and length.
            **kwargs: Other arguments of `keras.Model.export`.
        """
        if input_signature is None:
            input_signature = export_signature(self.call_inputs)
        super().export(filepath, *args, input_signature=input_signature, **kwargs)
