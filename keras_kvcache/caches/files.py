"""Caches in files, so that a prompt that ran once need not run again."""

import contextlib
import hashlib
import json
import os
import zlib
from pathlib import Path
from typing import Any

import jax
import keras
import numpy as np
from keras import ops

from keras_kvcache.attention.positions import FAR
from keras_kvcache.caches.descriptions import (
    describe,
    named_arrays,
    shape_of,
    shapes_of,
)
from keras_kvcache.caches.trees import (
    as_bits,
    as_cache,
    as_floats,
    batch_size,
    distributed,
    map_caches,
)
from keras_kvcache.errors import quoted, shortened
from keras_kvcache.runtime import atomic
from keras_kvcache.runtime.concrete import concrete_integers, is_integer

# Of the file's metadata: the key that makes it ours, with the version of the format,
# the description as JSON, and what tells that a byte of that changed.
FORMAT, FORMAT_VERSION = "keras_kvcache.caches", "3"
DESCRIPTION, CHECKSUM = "description", "checksum"
# What a file holds unless it says otherwise.
CACHES = "caches"

# Where the config of a model has names of layers.
NAMES = {"name", "input_layers", "output_layers", "inbound_nodes"}

# What the format calls the dtypes that caches have.
DTYPE_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U32": "uint32",
    "BOOL": "bool",
    "U8": "uint8",
}


def save_caches(
    path: str | os.PathLike, caches: Any, fill: Any, model: keras.Model | None = None
) -> None:
    """Writes caches and how far they are filled into one file.

    The file is of the safetensors format. It appears whole or not at all: an error
    leaves an earlier file as it was.

    Args:
        path: The file; its folder is made if need be.
        caches: A cache, a dense tensor `(B, 2, S, K, H)`, or tuples and lists of
            them, such as `init_cache` gives.
        fill: How many positions were written: an int, or integers `(B,)`.
        model: The `keras.Model` that the entries are of, or `None`. With it the file
            gets a fingerprint by which `load_caches` tells that model from others.

    Raises:
        TypeError: `caches` or `model` is something else.
        ValueError: `fill` isn't an integer or one a row, is negative or past the
            capacity; an array isn't as `CacheSpec.allocate` makes it; or the model
            isn't built.
        OSError: The file can't be written.
    """
    write_tree(path, caches, model, fill=fill)


def write_tree(
    path: str | os.PathLike,
    caches: Any,
    model: keras.Model | None = None,
    holds: str = CACHES,
    fill: Any = None,
) -> None:
    """Writes a tree as `save_caches` does, or one that holds more than caches.

    Args:
        path, caches, model: As in `save_caches`.
        holds: What the tree is, a text. Unless it's `CACHES` it may have dictionaries
            and other arrays, and there is no fill.
        fill: As in `save_caches`.
    """
    from safetensors.numpy import save_file

    # Files are the same on all platforms.
    path, caches = Path(path), as_floats(caches)
    structure = describe(caches, has_others=holds != CACHES)
    # What isn't as its description has it could not be loaded.
    expected = shapes_of(structure)
    held, form = named_arrays(caches)
    if form != named_arrays(expected)[1]:
        raise ValueError(
            "`caches` must be made as `CacheSpec.allocate` makes them. Received: "
            f"{quoted(caches)}"
        )
    _check_arrays(expected, {name: shape_of(array) for name, array in held.items()})
    fill = _read_fill(fill, expected) if holds == CACHES else None
    arrays = {name: _as_array(tensor) for name, tensor in held.items()}
    description = json.dumps(
        {
            "holds": holds,
            "caches": structure,
            "fill": fill,
            "model": None if model is None else fingerprint(model),
            "checksum": _checksum(map(_bytes_of, arrays.values())),
        }
    )
    metadata = {
        FORMAT: FORMAT_VERSION,
        DESCRIPTION: description,
        CHECKSUM: _checksum([description.encode()]),
    }
    with atomic.writing(path) as staged:
        save_file(arrays, staged, metadata)


def load_caches(
    path: str | os.PathLike, model: keras.Model | None = None
) -> tuple[Any, Any]:
    """Reads caches and how far they are filled from a file.

    Args:
        path: What `save_caches` wrote.
        model: The `keras.Model` that is to go on from them: a file that was saved
            with another one, or with none, is refused. With `None` any file is
            taken, and it's up to the caller that the model is the right one.

    Returns:
        The pair `(caches, fill)`: the same classes with the same bits, held and laid
        out as `CacheSpec.allocate` has them; `fill` is an int, or an int32 tensor
        `(B,)`.

    Raises:
        FileNotFoundError: There is no such file.
        TypeError: `model` is no `keras.Model`.
        ValueError: The file isn't one of caches, is of another version, is damaged,
            has arrays other than it describes or a fill that doesn't fit, or is of
            another model; or the model isn't built.
    """
    caches, fill = read_tree(path, model)
    return caches, fill if is_integer(fill) else ops.convert_to_tensor(fill, "int32")


def read_tree(
    path: str | os.PathLike, model: keras.Model | None = None, holds: str = CACHES
) -> tuple[Any, Any]:
    """Reads a tree as `load_caches` does.

    Args:
        path, model: As in `load_caches`.
        holds: What the file must hold, as in `write_tree`.

    Returns:
        The pair of the tree and of its fill: an integer, a list of them or `None`.
    """
    from safetensors import safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"`path` must be a file of caches. Received: {path}")
    model = None if model is None else fingerprint(model)
    with _refusing(path), safe_open(str(path), framework="numpy") as file:
        description = _read_description(file.metadata() or {})
        # Files that were written before there was more than caches don't say it.
        held = description["holds"] if "holds" in description else CACHES
        if held != holds:
            raise ValueError(
                f"It must hold {holds}, as `load_{holds}` reads them. Received: a file "
                f"of {quoted(held)}"
            )
        expected = shapes_of(description["caches"], limit=path.stat().st_size)
        # Files of before the field was renamed call it `newest`.
        stored = {name.replace(".newest.", ".residual."): name for name in file.keys()}
        held_shapes = {name: _shape_in(file, stored[name]) for name in stored}
        _check_arrays(expected, held_shapes)
        fill = None
        if holds == CACHES:
            fill = _read_fill(description["fill"], expected)
        if model not in (None, description["model"]):
            raise ValueError(
                "`model` must be the one that the caches were saved with, and its "
                f"weights the same. Received: fingerprint {model}, in the file "
                f"{description['model']}"
            )
        shapes, form = named_arrays(expected)
        arrays = [file.get_tensor(stored[name]) for name in shapes]
        if _checksum(map(_bytes_of, arrays)) != description["checksum"]:
            raise ValueError("Arrays must be as they were written. Received: others")
        tensors = [_as_tensor(array) for array in arrays]
    return distributed(as_bits(jax.tree_util.tree_unflatten(form, tensors))), fill


def fingerprint(model: keras.Model) -> str:
    """A digest by which a model is told from others.

    It covers what the model and its layers are configured as, where Keras knows that,
    and the name, shape, dtype and all values of every weight. The model's own name
    doesn't count, nor what the layers of a functional model are called.

    Args:
        model: A built `keras.Model`.

    Raises:
        TypeError: It's something else.
        ValueError: It isn't built.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"`model` must be a keras.Model. Received: {quoted(model)}")
    if not model.weights:
        raise ValueError(f"`model` must be built. Received: {model.name}, no weights")
    digest = hashlib.sha256(_configuration(model).encode())
    for weight in model.weights:
        name = weight.path.removeprefix(f"{model.name}/")
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype} ".encode())
        digest.update(_bytes_of(_as_array(weight.value)))
    return digest.hexdigest()


def _configuration(model):
    """A model's config as JSON: what its weights don't tell, such as its windows."""
    try:
        config = keras.saving.serialize_keras_object(dict(model.get_config()))
    except NotImplementedError:  # by a user's class
        return ""
    return json.dumps(_without_names(config), sort_keys=True)


def _without_names(config):
    """A config without the names of layers, which Keras may have made up."""
    if isinstance(config, dict):
        rest = config.keys() - NAMES
        return {key: _without_names(config[key]) for key in rest}
    if isinstance(config, list):
        return [_without_names(part) for part in config]
    return config


@contextlib.contextmanager
def _refusing(path):
    """Turns whatever is wrong with a file's content into a `ValueError` that names it.

    A stranger's file may hold any types, nested in any way.
    """
    from safetensors import SafetensorError

    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path} can't be loaded. {shortened(error, 500)}") from error
    except RecursionError as error:
        raise ValueError(
            f"{path} must describe caches. Received: a description nested too deep"
        ) from error
    except (SafetensorError, LookupError, TypeError) as error:
        raise ValueError(
            f"{path} must be a file that `save_caches` wrote, whole. Received: one "
            f"that gives {quoted(error)}"
        ) from error


def _read_description(metadata):
    if FORMAT not in metadata:
        raise ValueError(
            "It must be a file that `save_caches` wrote. Received: metadata "
            f"{sorted(metadata)}"
        )
    if metadata[FORMAT] != FORMAT_VERSION:
        raise ValueError(
            f"It must be of format version {FORMAT_VERSION}. Received: "
            f"{quoted(metadata[FORMAT])}"
        )
    text = metadata[DESCRIPTION]
    if _checksum([text.encode()]) != metadata[CHECKSUM]:
        raise ValueError("Its description must be as it was written. Received: another")
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(
            f"Its description must be JSON. Received: {shortened(error, 500)}"
        ) from error


def _shape_in(file, name):
    held = file.get_slice(name)
    if held.get_dtype() not in DTYPE_NAMES:
        raise ValueError(
            f"{name} must have one of the dtypes {sorted(DTYPE_NAMES.values())}. "
            f"Received: {held.get_dtype()}"
        )
    return jax.ShapeDtypeStruct(tuple(held.get_shape()), DTYPE_NAMES[held.get_dtype()])


def _check_arrays(expected, held):
    """Refuses arrays that aren't those of the caches.

    Args:
        expected: Tree of caches, with shapes for arrays.
        held: Shapes by name.
    """
    expected, _ = named_arrays(expected)
    missing, extra = expected.keys() - held.keys(), held.keys() - expected.keys()
    if missing or extra:
        raise ValueError(
            "Arrays must be those of the caches. Received: "
            f"missing {sorted(missing)[:5]}, left over {sorted(extra)[:5]}"
        )
    for name, shape in expected.items():
        if held[name] != shape:
            raise ValueError(
                f"{name} must have the shape {shape.shape} and dtype {shape.dtype}. "
                f"Received: {held[name].shape} and {held[name].dtype}"
            )


def _read_fill(fill, caches):
    """The fill as an int or a list of them; refuses more than the caches hold."""
    known = concrete_integers("fill", fill, batch_size(caches))
    if known is None:
        raise ValueError(
            f"`fill` must be known and no tracer. Received: {quoted(fill)}"
        )

    def check(cache):
        length = as_cache(cache).max_length
        end = FAR if length is None else length
        rows = batch_size(cache)
        fits_rows = known.shape in ((), (rows,))
        if not fits_rows or (known < 0).any() or (known > end).any():
            raise ValueError(
                f"`fill` must be from 0 to the capacity {end}, one for all or for each "
                f"of {rows} rows. Received: {fill}"
            )

    map_caches(check, caches)
    return known.tolist()


def _as_array(tensor):
    """A contiguous NumPy array, as the format needs it."""
    return np.ascontiguousarray(ops.convert_to_numpy(tensor))


def _as_tensor(array):
    tensor = ops.convert_to_tensor(array)
    held = keras.backend.standardize_dtype(tensor.dtype)
    if held != array.dtype.name:
        raise ValueError(
            "Arrays must be of a dtype that the backend has. Received: "
            f"{array.dtype.name}, which becomes {held}"
        )
    return tensor


def _bytes_of(array):
    return array.reshape(-1).view("uint8")


def _checksum(parts):
    """CRC-32 of some pieces of bytes: it detects damage, not forgery."""
    total = 0
    for part in parts:
        total = zlib.crc32(part, total)
    return f"{total:08x}"
