"""Key/value caches behind one verb: `cache.update(key, value, index)`."""

from keras_kvcache.caches.base import Cache
from keras_kvcache.caches.dense import DenseCache
from keras_kvcache.caches.spec import CacheSpec
from keras_kvcache.caches.static import StaticCache

__all__ = ["Cache", "CacheSpec", "DenseCache", "StaticCache"]
