"""Text from any Keras model that takes token ids, caches and an index."""

from keras_kvcache.generation.generator import Generator
from keras_kvcache.generation.methods import GenerateMethods

__all__ = ["GenerateMethods", "Generator"]
