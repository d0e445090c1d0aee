"""Trees of caches without their arrays: as JSON, as shapes, in exported programs."""

import dataclasses
import json
import math
from reprlib import repr as short
from typing import Any

import jax
import keras
import numpy as np
from jax import export
from keras import ops

from keras_kvcache.attention import codecs
from keras_kvcache.caches.cache import Cache, nbytes
from keras_kvcache.caches.dense import DenseStorage
from keras_kvcache.caches.head_major import HeadMajorStorage
from keras_kvcache.caches.kinds import Rolling, Static
from keras_kvcache.caches.residual import Residual
from keras_kvcache.caches.rolling import RollingCache
from keras_kvcache.caches.spec import LAYOUTS, CacheSpec
from keras_kvcache.caches.static import StaticCache
from keras_kvcache.errors import quoted
from keras_kvcache.runtime.concrete import is_integer

# Classes by the names that descriptions have for them.
CODEC_NAMES = {"exact": codecs.Exact, **codecs.CODECS}
KIND_NAMES = {kind.name: kind for kind in (Static, Rolling)}
CONTAINERS = {"tuple": tuple, "list": list}
# Classes of tuples whose parts have names; `is_container` adds to them.
RECORDS = {}
# Dtypes that arrays beside caches may have.
ARRAY_DTYPES = (*codecs.FLOATS, "int32", "int16", "int8", "uint32", "uint8", "bool")


def is_container(cls: type) -> type:
    """Decorates a `NamedTuple` that holds caches, so that files can hold it."""
    RECORDS[cls.__name__] = cls
    return cls


def describe(caches: Any, has_others: bool = False) -> dict[str, Any]:
    """Describes a tree of caches without its arrays.

    Args:
        caches: A cache, a dense tensor `(B, 2, S, K, H)`, or tuples and lists of them.
        has_others: Whether there may be other arrays, of any shape, dictionaries and
            `None`, too.

    Returns:
        A value for JSON, from which `shapes_of` makes the tree again.

    Raises:
        TypeError: It's something else.
    """
    if type(caches) in CONTAINERS.values():
        parts = [describe(part, has_others) for part in caches]
        name = type(caches).__name__
        return {name: parts} if parts else {"none": name}
    if type(caches) in RECORDS.values():
        parts = [describe(part, True) for part in caches]
        return {"record": {"name": type(caches).__name__, "parts": parts}}
    if has_others and isinstance(caches, dict):
        if not all(isinstance(key, str) for key in caches):
            raise TypeError(
                "Keys of dictionaries must be strings, as files hold no others. "
                f"Received: {short(list(caches))}"
            )
        return {"dict": {key: describe(part, True) for key, part in caches.items()}}
    if has_others and caches is None:
        return {"none": "none"}
    if type(caches) in (StaticCache, RollingCache):
        return {"cache": _describe_spec(spec_of(caches))}
    if ops.is_tensor(caches) or isinstance(caches, np.ndarray):
        shape = shape_of(caches)
        if has_others:
            return {"array": {"shape": shape.shape, "dtype": shape.dtype.name}}
        return {"tensor": {"shape": shape.shape, "dtype": shape.dtype.name}}
    raise TypeError(
        "`caches` must be a cache, a dense tensor, or tuples and lists of them. "
        f"Received: {type(caches).__name__}"
    )


def shapes_of(description: Any, limit: float = math.inf) -> Any:
    """The tree that is described, with shapes in the place of arrays.

    Args:
        description: A result of `describe`, or whatever a file holds instead.
        limit: Bytes that the arrays may take; a description of more is refused, so that
            a hostile one takes no more memory than its file.

    Raises:
        ValueError, LookupError, TypeError, RecursionError: It's no result of
            `describe`.
    """
    need = 0

    def build(part):
        nonlocal need
        if not isinstance(part, dict) or len(part) != 1:
            raise ValueError(
                f"A description must have one key. Received: {short(part)}"
            )
        ((what, content),) = part.items()
        if what in CONTAINERS and content:
            return CONTAINERS[what](map(build, content))
        if what == "record":
            return RECORDS[content["name"]](*map(build, content["parts"]))
        if what == "dict":
            return {name: build(part) for name, part in content.items()}
        if what == "none":
            return {"none": None, "tuple": (), "list": []}[content]
        if what == "cache":
            shapes = _read_spec(content).shapes()
        elif what == "tensor":
            shapes = _read_tensor(content, codecs.FLOATS)
        elif what == "array":
            shapes = _read_tensor(content, ARRAY_DTYPES)
        else:
            raise ValueError(
                "`caches` must be a 'cache', a 'tensor', or a 'tuple' or 'list' of at "
                f"least one. Received: {quoted(what)} of {short(content)}"
            )
        need += nbytes(shapes)
        if need > limit:
            raise ValueError(
                f"Arrays must be there. Received: {limit} bytes, for at least {need}"
            )
        return shapes

    return build(description)


def spec_of(cache: Cache) -> CacheSpec:
    """The `CacheSpec` of an existing cache."""
    storage = cache.storage
    is_rolling = isinstance(cache, RollingCache)
    return CacheSpec(
        batch_size=storage.segments[0][0].shape[0],
        capacity=cache.capacity,
        num_key_value_heads=storage.heads,
        head_dim=storage.head_dim,
        value_dim=storage.value_dim,
        codec=cache.codec,
        layout=_name_in(LAYOUTS, type(storage)),
        kind=Rolling(cache.window, cache.sink_count) if is_rolling else Static(),
    )


def shape_of(array: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an array."""
    dtype = keras.backend.standardize_dtype(array.dtype)
    return jax.ShapeDtypeStruct(tuple(map(int, array.shape)), dtype)


def named_arrays(tree: Any) -> tuple[dict[str, Any], Any]:
    """The arrays of a tree by name, such as `"caches[0].storage.segments[0][1]"`.

    Returns:
        The pair of a dictionary, in the order of the tree, and the tree's form.
    """
    pairs, form = jax.tree_util.tree_flatten_with_path(tree)
    name = jax.tree_util.keystr
    return {f"caches{name(path)}": array for path, array in pairs}, form


def _describe_spec(spec):
    described = dataclasses.asdict(spec)
    for option, table in (("codec", CODEC_NAMES), ("kind", KIND_NAMES)):
        described[option]["name"] = _name_in(table, type(getattr(spec, option)))
    return described


def _read_spec(described):
    options = _as_dict("cache", described)
    for option, table in (("codec", CODEC_NAMES), ("kind", KIND_NAMES)):
        details = _as_dict(option, options[option])
        name = details.pop("name")
        if name not in list(table):
            raise ValueError(
                f"`{option}` must be one of {list(table)}. Received: {quoted(name)}"
            )
        options[option] = table[name](**details)
    return CacheSpec(**options)


def _as_dict(name, described):
    if not isinstance(described, dict):
        raise ValueError(
            f"`{name}` must be described by names. Received: {short(described)}"
        )
    return dict(described)


def _read_tensor(described, dtypes):
    if described["dtype"] not in dtypes:
        raise ValueError(
            f"`dtype` must be one of {list(dtypes)}. Received: "
            f"{quoted(described['dtype'])}"
        )
    sizes = tuple(described["shape"])
    if not all(is_integer(size) and size > 0 for size in sizes):
        raise ValueError(f"Sizes must be positive integers. Received: {sizes}")
    return jax.ShapeDtypeStruct(sizes, described["dtype"])


def _name_in(table, wanted):
    for name, held in table.items():
        if held is wanted:
            return name
    raise TypeError(
        f"`caches` must be of {[held.__name__ for held in table.values()]}. Received: "
        f"{wanted.__name__}"
    )


# Classes of nodes and of static fields in exported programs.
NODES = (StaticCache, RollingCache, DenseStorage, HeadMajorStorage, Residual)
EXPORTED = {
    codec.__name__: codec
    for codec in (*CODEC_NAMES.values(), codecs.Int4Residual, codecs.Bits)
}


def register() -> None:
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
    return {"codec": type(value).__name__, **dataclasses.asdict(value)}


def _restore(value):
    if not isinstance(value, dict):
        return value
    return EXPORTED[value.pop("codec")](**value)
