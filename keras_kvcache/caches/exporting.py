"""Caches as arguments and results of functions that `jax.export` serializes."""

import dataclasses
import json

from jax import export

from keras_kvcache.attention import codecs
from keras_kvcache.attention.codecs import Bits
from keras_kvcache.caches.dense import DenseStorage
from keras_kvcache.caches.head_major import HeadMajorStorage
from keras_kvcache.caches.residual import Residual
from keras_kvcache.caches.rolling import RollingCache
from keras_kvcache.caches.static import StaticCache

NODES = (StaticCache, RollingCache, DenseStorage, HeadMajorStorage, Residual)
CODECS = {
    codec.__name__: codec
    for codec in (codecs.Exact, codecs.Int8, codecs.Int4, codecs.Int4Residual, Bits)
}


def register():
    """Lets `jax.export` serialize functions that take or return caches.

    A program that reads such a function imports `keras_kvcache.caches` before. The
    static fields of a cache become JSON: numbers and `None` as they are, a codec as a
    dictionary of its class and its fields.
    """
    for node in NODES:
        export.register_pytree_node_serialization(
            node,
            serialized_name=f"keras_kvcache.caches.{node.__name__}",
            serialize_auxdata=_serialize,
            deserialize_auxdata=_deserialize,
        )


def _serialize(static):
    return json.dumps([_describe(value) for value in static]).encode()


def _deserialize(data):
    return tuple(_restore(value) for value in json.loads(bytes(data)))


def _describe(value):
    if not isinstance(value, codecs.Codec):
        return value
    fields = dataclasses.fields(value)
    described = {field.name: getattr(value, field.name) for field in fields}
    return {"codec": type(value).__name__, **described}


def _restore(value):
    if not isinstance(value, dict):
        return value
    return CODECS[value.pop("codec")](**value)
