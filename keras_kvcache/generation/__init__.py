"""Text from any Keras model that takes token ids, caches and an index."""

from keras_kvcache.generation.files import load_rows, save_rows
from keras_kvcache.generation.generator import Generator
from keras_kvcache.generation.options import GenerateOptions
from keras_kvcache.generation.program import make_program
from keras_kvcache.generation.rows import NO_TOKEN, Rows
from keras_kvcache.generation.steps import (
    StepFunctions,
    advance,
    choose,
    decode,
    extend,
    prefill,
)
from keras_kvcache.generation.stream import TextStream
from keras_kvcache.runtime.platform import compiler_options

__all__ = [
    "NO_TOKEN",
    "GenerateOptions",
    "Generator",
    "Rows",
    "StepFunctions",
    "TextStream",
    "advance",
    "choose",
    "compiler_options",
    "decode",
    "extend",
    "load_rows",
    "make_program",
    "prefill",
    "save_rows",
]
