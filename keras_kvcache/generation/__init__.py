"""Text from any Keras model that takes token ids, caches and an index."""

from keras_kvcache.generation.generator import Generator
from keras_kvcache.generation.methods import GenerateMethods
from keras_kvcache.generation.program import make_program

__all__ = ["GenerateMethods", "Generator", "make_program"]
