"""The header of a GGUF file: its metadata and where its tensors lie.

The reader of the `gguf` package makes one array object a string, which takes
seconds for a vocabulary, and trusts the counts it reads. This one checks every
count against the bytes that are left before it uses it.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from keras_kvcache.errors import quoted, shortened

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MAX_DIMENSIONS = 4
# Type codes of metadata values, from the GGUF specification.
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_STRING = 8
_ARRAY = 9
# The fewest bytes a metadata pair (key length, type, value) and a tensor
# description (name length, rank, type, offset) can take: what bounds the counts.
_MIN_PAIR = 8 + 4 + 1
_MIN_TENSOR = 8 + 4 + 4 + 8


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies and how it is stored.

    Attributes:
        shape: As NumPy sees it, slowest axis first.
        quantization: Its `gguf.GGMLQuantizationType`.
        offset: Of its first byte, from the beginning of the file.
        size: In bytes.
    """

    shape: tuple[int, ...]
    quantization: Any
    offset: int
    size: int


@dataclass(frozen=True)
class Header:
    """The metadata by key (scalars, strings, lists) and the tensors by name."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


def read_header(path: str | os.PathLike) -> Header:
    """Reads the header and checks that the file holds all it announces.

    Args:
        path: Of a GGUF file, version 2 or 3, little-endian.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no GGUF file, is cut short or contradicts
            itself. The message names the path, the rule and what was found.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"`path` must name a GGUF file. Received: {path}, which is absent"
        )
    if not path.is_file():
        raise ValueError(
            f"`path` must name a GGUF file. Received: {path}, which is no file"
        )
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            magic = file.read(4)
            if magic != _MAGIC:
                raise ValueError(
                    f"it must begin with {quoted(_MAGIC)}. Received: {quoted(magic)}"
                )
            with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as data:
                return _parse(_Cursor(data, size))
    except ValueError as error:
        raise ValueError(
            f"{path} is not a usable GGUF file: {shortened(error, 500)}"
        ) from error


class _Cursor:
    """A place in the file; every read is checked against the file's end."""

    def __init__(self, data: mmap.mmap, size: int):
        self.data = data
        self.size = size
        self.at = len(_MAGIC)

    def take(self, count: int, what: str) -> bytes:
        """Reads the next `count` bytes; `what` names them in errors."""
        self.require(count, what)
        start, self.at = self.at, self.at + count
        return self.data[start : self.at]

    def require(self, count: int, what: str) -> None:
        if count > self.size - self.at:
            raise ValueError(
                f"it is cut short: {what} needs {count} bytes at offset "
                f"{self.at}, but the file has {self.size} bytes."
            )

    def integer(self, form: str, what: str) -> int:
        return struct.unpack(form, self.take(struct.calcsize(form), what))[0]

    def string(self, what: str) -> str:
        text = self.take(self.integer("<Q", what), what)
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{what} must be UTF-8. Received: {quoted(text[:40])}"
            ) from error

    def strings(self, count: int, what: str) -> list[str]:
        self.require(8 * count, what)
        return [self.string(what) for _ in range(count)]


def _parse(cursor: _Cursor) -> Header:
    version = cursor.integer("<I", "the version")
    if version not in _VERSIONS:
        # A big-endian file shows its version in the upper half.
        order = " (a big-endian file)" if version and not version & 0xFFFF else ""
        raise ValueError(
            f"its version must be one of {_VERSIONS}. Received: {version}{order}"
        )
    num_tensors = cursor.integer("<Q", "the number of tensors")
    num_pairs = cursor.integer("<Q", "the number of metadata pairs")
    cursor.require(num_pairs * _MIN_PAIR, f"a list of {num_pairs} metadata pairs")
    metadata = {}
    for _ in range(num_pairs):
        key = cursor.string("a metadata key")
        if key in metadata:
            raise ValueError(
                f"a metadata key must occur once. Received: {quoted(key)} twice"
            )
        metadata[key] = _read_value(cursor, key)
    cursor.require(num_tensors * _MIN_TENSOR, f"a list of {num_tensors} tensors")
    described = [_read_tensor(cursor) for _ in range(num_tensors)]
    return Header(metadata, _place_tensors(cursor, metadata, described))


def _read_value(cursor: _Cursor, key: str) -> Any:
    what = f"the value of {quoted(key)}"
    code = cursor.integer("<I", what)
    count = None
    if code == _ARRAY:
        code = cursor.integer("<I", what)
        count = cursor.integer("<Q", what)
    if code == _STRING:
        return cursor.string(what) if count is None else cursor.strings(count, what)
    if code not in _SCALARS:
        raise ValueError(
            f"{what} must be a number, a string or a flat list of these. Received: "
            f"type code {code}"
        )
    kind = np.dtype(_SCALARS[code])
    values = np.frombuffer(
        cursor.take(kind.itemsize * (1 if count is None else count), what), kind
    ).tolist()
    return values[0] if count is None else values


def _read_tensor(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """One tensor's name, shape, type code and offset into the data."""
    name = cursor.string("a tensor's name")
    what = f"the description of tensor {quoted(name)}"
    rank = cursor.integer("<I", what)
    if rank > _MAX_DIMENSIONS:
        raise ValueError(
            f"tensor {quoted(name)} must have at most {_MAX_DIMENSIONS} dimensions. "
            f"Received: {rank}"
        )
    # The file lists the fastest axis first.
    shape = struct.unpack(f"<{rank}Q", cursor.take(8 * rank, what))[::-1]
    return name, shape, cursor.integer("<I", what), cursor.integer("<Q", what)


def _place_tensors(
    cursor: _Cursor, metadata: dict[str, Any], described: list
) -> dict[str, TensorInfo]:
    """Turns the descriptions into places in the file that are inside it."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(
            "'general.alignment' must be a positive integer. Received: "
            f"{quoted(alignment)}"
        )
    begin = -(-cursor.at // alignment) * alignment
    tensors = {}
    for name, shape, code, offset in described:
        if name in tensors:
            raise ValueError(
                f"a tensor must occur once. Received: {quoted(name)} twice"
            )
        try:
            quantization = GGMLQuantizationType(code)
        except ValueError as error:
            raise ValueError(
                f"tensor {quoted(name)} must be of a known quantization type. "
                f"Received: type {code}"
            ) from error
        block, block_bytes = GGML_QUANT_SIZES[quantization]
        if shape and shape[-1] % block:
            raise ValueError(
                f"the rows of {quantization.name} tensor {quoted(name)} must be a "
                f"multiple of {block} long. Received: shape {shape}"
            )
        size = math.prod(shape) // block * block_bytes
        if begin + offset + size > cursor.size:
            raise ValueError(
                f"it is cut short: tensor {quoted(name)} ends at byte "
                f"{begin + offset + size}, but the file has {cursor.size} bytes."
            )
        tensors[name] = TensorInfo(shape, quantization, begin + offset, size)
    return tensors
