"""Language models as programs for other runtimes."""

import keras
from keras import tree


class Exports:
    """Gives a model an `export` that knows the model's inputs.

    It needs `call_inputs`: symbolic tensors with the inputs' names, shapes and dtypes.
    """

    def export(self, filepath, *args, input_signature=None, **kwargs):
        """As `keras.Model.export`; the model needn't have been called before.

        Keras would derive the signature from an earlier call, with token ids as floats.

        Args:
            filepath: Where to write.
            *args: Other arguments of `keras.Model.export`.
            input_signature: As there; `None` for integers of any batch and length.
            **kwargs: Other arguments of `keras.Model.export`.
        """
        if input_signature is None:
            input_signature = [tree.map_structure(_input_spec, self.call_inputs)]
        super().export(filepath, *args, input_signature=input_signature, **kwargs)


def token_ids_input(name):
    """The symbolic input `(B, T)` of token ids."""
    return keras.KerasTensor((None, None), "int32", name=name)


def _input_spec(tensor):
    return keras.InputSpec(shape=tensor.shape, dtype=tensor.dtype, name=tensor.name)
