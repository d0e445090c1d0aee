"""Text from any Keras model that takes token ids, caches and an index."""

from keras_kvcache.generation.generator import Generator
from keras_kvcache.generation.program import make_program
from keras_kvcache.generation.stream import TextStream

__all__ = ["Generator", "TextStream", "make_program"]
