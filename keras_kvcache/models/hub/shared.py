"""A model whose layers belong to a keras-hub model too."""

from types import MappingProxyType

from keras_kvcache.layers.quantization import KEY as QUANTIZATION
from keras_kvcache.models.decoder_lm import DecoderLM
from keras_kvcache.models.encoder_decoder_lm import EncoderDecoderLM
from keras_kvcache.models.hub.own_copy import own_copy


class SharesLayers:
    """A model of foreign layers, and what it can't do with files.

    Args:
        parts: What to adopt, by the names of the model's attributes; blocks are
            `"block_0"`, `"block_1"` and so on.
        **config: Arguments of the model.
    """

    def __init__(self, parts, **config):
        self._parts = MappingProxyType(parts)
        super().__init__(**config)

    def get_config(self):
        """As in the base class, but not how the layers are quantized.

        Their names are those of the other model.
        """
        config = super().get_config()
        config.pop(QUANTIZATION, None)
        return config

    def save_own_variables(self, store):
        """Refuses to be saved as part of another model.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "A model that shares the layers of a keras-hub model can't be saved as "
            f"part of another. Received: {self.name}; {self._saved_by}"
        )

    def load_weights(self, filepath, *args, **kwargs):
        """Refuses to read a file.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "Weights must be loaded by the keras-hub model whose layers this one "
            f"shares; it sees them at once. Received: filepath={filepath!r}"
        )


class SharedDecoderLM(SharesLayers, DecoderLM):
    """A `DecoderLM` made of another model's layers, as `from_keras_hub` makes it.

    Their weights may lie otherwise than those of a `DecoderLM` do, so what is saved
    is a copy with weights of its own, and files are read by the other model.

    Args:
        parts: As in `SharesLayers`.
        has_last_position: As in `DecoderLM`; here rotations may have an end, too.
        **config: Arguments of `DecoderLM`.
    """

    _saved_by = "use `save_to_preset` on it"
    has_last_position = False

    def __init__(self, parts, has_last_position, **config):
        self.has_last_position = has_last_position
        super().__init__(parts, **config)

    @classmethod
    def from_config(cls, config):
        """A `DecoderLM` of this config, with weights of its own."""
        return DecoderLM.from_config(config)

    def save(self, *args, **kwargs):
        """As `keras.Model.save`; a `DecoderLM` with weights of its own is saved."""
        own_copy(self).save(*args, **kwargs)

    def save_weights(self, *args, **kwargs):
        """As `keras.Model.save_weights`, in the layout of a `DecoderLM`."""
        own_copy(self).save_weights(*args, **kwargs)

    def save_to_preset(self, directory):
        """As in `DecoderLM`; one with weights of its own is saved."""
        own_copy(self).save_to_preset(directory)

    def __reduce__(self):
        """Pickles and copies a `DecoderLM` with weights of its own."""
        return own_copy(self).__reduce__()


class SharedEncoderDecoderLM(SharesLayers, EncoderDecoderLM):
    """An `EncoderDecoderLM` made of another model's layers, its encoder included.

    Files are written and read by the other model.
    """

    _saved_by = "save the keras-hub model"

    def save(self, filepath, *args, **kwargs):
        """Refuses to write a file.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "A model that shares the layers of a keras-hub model must be saved by "
            f"that model. Received: filepath={filepath!r}"
        )

    save_weights = save
