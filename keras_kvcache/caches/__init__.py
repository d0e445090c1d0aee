"""Key/value caches behind one verb: `cache.update(key, value, index)`."""

from keras_kvcache.attention.codecs import CODECS, Codec, Exact, Int4, Int8, get_codec
from keras_kvcache.caches.cache import Cache
from keras_kvcache.caches.descriptions import register as _register
from keras_kvcache.caches.files import load_caches, save_caches
from keras_kvcache.caches.kinds import Rolling, Static
from keras_kvcache.caches.resizing import crop, resize, resize_window, with_end
from keras_kvcache.caches.rolling import RollingCache
from keras_kvcache.caches.rows import (
    insert_rows,
    join_rows,
    repeat_rows,
    reset_rows,
    split_rows,
    take_rows,
)
from keras_kvcache.caches.spec import CacheSpec
from keras_kvcache.caches.static import StaticCache
from keras_kvcache.caches.trees import as_cache, batch_size
from keras_kvcache.known_names import DTYPES

_register()

__all__ = [
    "CODECS",
    "DTYPES",
    "Cache",
    "CacheSpec",
    "Codec",
    "Exact",
    "Int4",
    "Int8",
    "Rolling",
    "RollingCache",
    "Static",
    "StaticCache",
    "as_cache",
    "batch_size",
    "crop",
    "get_codec",
    "insert_rows",
    "join_rows",
    "load_caches",
    "repeat_rows",
    "reset_rows",
    "resize",
    "resize_window",
    "save_caches",
    "split_rows",
    "take_rows",
    "with_end",
]
