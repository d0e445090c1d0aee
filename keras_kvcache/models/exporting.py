"""Inputs of language models, for programs that other runtimes run."""

from typing import Any

import keras
from keras import tree


def export_signature(call_inputs: Any) -> list:
    """The `input_signature` of `keras.Model.export`: integers of any batch and length.

    Keras would derive it from an earlier call, with token ids as floats.

    Args:
        call_inputs: Symbolic tensors with the names, shapes and dtypes of what the
            model is called with.
    """
    return [tree.map_structure(_input_spec, call_inputs)]


def token_ids_input(name: str) -> keras.KerasTensor:
    """The symbolic input `(B, T)` of token ids."""
    return keras.KerasTensor((None, None), "int32", name=name)


def _input_spec(tensor):
    return keras.InputSpec(shape=tensor.shape, dtype=tensor.dtype, name=tensor.name)
