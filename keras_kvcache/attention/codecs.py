"""Codecs: how keys and values are encoded and decoded."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_kvcache.attention.quantize import (
    dequantize_int4_groups,
    pack_int4,
    quantize_int4,
    quantize_int4_groups,
    quantize_int8,
    rotation,
    unpack_int4,
)
from keras_kvcache.known_names import CODED, FLOATS
from keras_kvcache.runtime.platform import current_platform

# bfloat16 scales are stored bit-cast to int16: on a CPU, XLA would widen a whole array
# of them for each slot it writes (see `Bits`).
BITS = "int16"

# Slots of head-major storage that are decoded at a time: their floats fit a processor's
# cache.
CODED_BLOCK = 512


class Operand(NamedTuple):
    """Some slots of keys or values, ready for a product.

    Attributes:
        matrix: Their numbers, still to be multiplied with the scale.
        scale: One factor a slot and head, 1 in the place of the head size; `None`
            for none. It's folded into scores and weights.
        rotation: Orthogonal matrix `(Hv, Hv)` that values were multiplied with;
            `None` for none. It's undone in their weighted sums, not in themselves.
    """

    matrix: Any
    scale: Any = None
    rotation: Any = None

    def decoded(self) -> Any:
        """Keys or values as floats; where they are rotated, `Hv` is the last axis."""
        entries = self.matrix
        if self.scale is not None:
            # Rotated values may be beyond the range of a narrow dtype.
            entries = ops.cast(entries, "float32") * ops.cast(self.scale, "float32")
        return rotate_back(entries, self.rotation)


def rotate_back(values: Any, rotation: Any) -> Any:
    """Undoes the rotation of values `(…, Hv)`."""
    if rotation is None:
        return values
    return ops.matmul(values, ops.cast(rotation.T, values.dtype))


class CodedArray(NamedTuple):
    """The shape and dtype of one of the arrays of coded keys or values.

    Attributes:
        width: Size of the axis that takes the place of the head size.
        tokens: How many tokens share an entry; 1 if each has its own.
        dtype: Dtype of the numbers.
    """

    width: int
    tokens: int
    dtype: str


@dataclass(frozen=True)
class Codec(abc.ABC):
    """How keys and values are stored.

    Methods take arrays in the order of a layout: `axis` is the axis of the head size,
    `slots` that of the slots, both positive.

    Attributes:
        dtype: Dtype of exact entries, and of those that are decoded.

    Raises:
        ValueError: The dtype is unknown.
    """

    dtype: str = "float32"

    # Tokens of a code group. Keys stay exact until their group is full.
    group = 1
    # The most slots that few queries are multiplied with at a time; `None` for all.
    block = CODED_BLOCK
    # Whether kernels read the arrays of a segment.
    kernels_read = False
    # Whether keys and values are stored as they are.
    is_exact = False

    def __post_init__(self):
        if self.dtype not in FLOATS:
            raise ValueError(
                f"`dtype` must be one of {list(FLOATS)}. Received: {self.dtype!r}"
            )

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """The name by which users choose the codec."""

    @property
    def residual_codec(self) -> Codec:
        """The codec of the residual."""
        return self

    @abc.abstractmethod
    def key_arrays(self, head_dim: int) -> tuple[CodedArray, ...]:
        """The `CodedArray`s of keys of a head size."""

    @abc.abstractmethod
    def value_arrays(self, head_dim: int) -> tuple[CodedArray, ...]:
        """The `CodedArray`s of values of a head size."""

    @abc.abstractmethod
    def encode_keys(self, keys: Any, axis: int, slots: int) -> tuple[Any, ...]:
        """Encodes keys: one array for each of `key_arrays`."""

    @abc.abstractmethod
    def encode_values(self, values: Any, axis: int, slots: int) -> tuple[Any, ...]:
        """Encodes values: one array for each of `value_arrays`."""

    @abc.abstractmethod
    def read_keys(
        self, arrays: Sequence[Any], head_dim: int, axis: int, slots: int
    ) -> Operand:
        """Decodes keys to an `Operand`."""

    @abc.abstractmethod
    def read_values(
        self, arrays: Sequence[Any], head_dim: int, axis: int, slots: int
    ) -> Operand:
        """Decodes values to an `Operand`."""


@dataclass(frozen=True)
class Exact(Codec):
    """Exact entries, cast to a dtype."""

    is_exact = True

    @property
    def name(self) -> str:
        return self.dtype

    @property
    def block(self) -> int | None:
        """`None` unless entries are widened for a product, as on a CPU."""
        is_wide = self.dtype in ("float32", "float64")
        return None if is_wide or current_platform().multiplies_narrow else CODED_BLOCK

    @property
    def kernels_read(self) -> bool:
        """Whether kernels read its dtype; float16 on GPUs alone."""
        return self.dtype in ("float32", "bfloat16") or (
            self.dtype == "float16" and current_platform().kernel == "gpu"
        )

    def key_arrays(self, head_dim: int) -> tuple[CodedArray, ...]:
        return (CodedArray(head_dim, 1, self.dtype),)

    def encode_keys(self, keys: Any, axis: int, slots: int) -> tuple[Any, ...]:
        return (ops.cast(keys, self.dtype),)

    def read_keys(
        self, arrays: Sequence[Any], head_dim: int, axis: int, slots: int
    ) -> Operand:
        (entries,) = arrays
        if self.block is not None:
            # A CPU's products of narrow numbers are slower than this.
            entries = ops.cast(entries, "float32")
        return Operand(entries)

    value_arrays, encode_values, read_values = key_arrays, encode_keys, read_keys


@dataclass(frozen=True)
class Bits(Exact):
    """Exact entries of 16 bits, stored bit-cast to int16.

    XLA has no narrow floats on a CPU: to write or read some slots of an array it widens
    all of it and narrows it again, token by token. Integers it leaves alone, so that
    only the slots that are read are converted.
    """

    @property
    def name(self) -> str:
        return f"{self.dtype} as bits"

    def key_arrays(self, head_dim: int) -> tuple[CodedArray, ...]:
        return (CodedArray(head_dim, 1, BITS),)

    def encode_keys(self, keys: Any, axis: int, slots: int) -> tuple[Any, ...]:
        return tuple(
            ops.view(array, BITS) for array in super().encode_keys(keys, axis, slots)
        )

    def read_keys(
        self, arrays: Sequence[Any], head_dim: int, axis: int, slots: int
    ) -> Operand:
        floats = tuple(ops.view(array, self.dtype) for array in arrays)
        return super().read_keys(floats, head_dim, axis, slots)

    value_arrays, encode_values, read_values = key_arrays, encode_keys, read_keys


@dataclass(frozen=True)
class AsGiven(Exact):
    """Entries that were never cached: products take them as they are."""

    block = None
    kernels_read = False


@dataclass(frozen=True)
class Int8(Codec):
    """8 bits a number, one scale for each token and head."""

    name = "int8"
    kernels_read = True

    def key_arrays(self, head_dim: int) -> tuple[CodedArray, ...]:
        return CodedArray(head_dim, 1, "int8"), CodedArray(1, 1, "float32")

    def encode_keys(self, keys: Any, axis: int, slots: int) -> tuple[Any, ...]:
        return quantize_int8(keys, axis)

    def read_keys(
        self, arrays: Sequence[Any], head_dim: int, axis: int, slots: int
    ) -> Operand:
        codes, scale = arrays
        return Operand(ops.cast(codes, self.dtype), scale)

    value_arrays, encode_values, read_values = key_arrays, encode_keys, read_keys


class _Int4Values(Codec):
    """4 bits a number of a rotated value, one scale for each token and head."""

    def value_arrays(self, head_dim):
        return CodedArray(-(-head_dim // 2), 1, "uint8"), CodedArray(1, 1, BITS)

    def encode_values(self, values, axis, slots):
        # The head size is the last axis of values in every layout. Rotated ones may be
        # larger than float16 can tell.
        values = ops.cast(values, "float32")
        turned = ops.matmul(values, rotation(values.shape[axis]))
        codes, scale = quantize_int4(turned, axis)
        return pack_int4(codes, axis), ops.view(scale, BITS)

    def read_values(self, arrays, head_dim, axis, slots):
        packed, scale = arrays
        scale = ops.view(scale, "bfloat16")
        codes = ops.cast(unpack_int4(packed, axis, head_dim), self.dtype)
        # Both are exact; weights take in the scale, and float16 might have no room
        # for all of it.
        return Operand(16.0 * codes - 120.0, scale / 16.0, rotation(head_dim))


@dataclass(frozen=True)
class Int4(_Int4Values):
    """4 bits a number; of keys, a range for each channel over 32 tokens.

    Of a value vector about a tenth of its length is lost, whichever way it points: a
    constant one comes back uneven, too.

    Methods: KIVI (Liu et al., 2024, https://arxiv.org/abs/2402.02750), with values
    rotated as in QuaRot (Ashkboos et al., 2024, https://arxiv.org/abs/2404.00456).
    """

    name = "int4"
    group = 32

    @property
    def residual_codec(self) -> Codec:
        return Int4Residual(self.dtype)

    def key_arrays(self, head_dim: int) -> tuple[CodedArray, ...]:
        of_group = CodedArray(head_dim, self.group, BITS)
        return CodedArray(-(-head_dim // 2), 1, "uint8"), of_group, of_group

    def encode_keys(self, keys: Any, axis: int, slots: int) -> tuple[Any, ...]:
        codes, *of_groups = quantize_int4_groups(keys, slots, self.group)
        bits = (ops.view(numbers, BITS) for numbers in of_groups)
        return pack_int4(codes, axis), *bits

    def read_keys(
        self, arrays: Sequence[Any], head_dim: int, axis: int, slots: int
    ) -> Operand:
        packed, *of_groups = arrays
        scale, lowest = (ops.view(bits, "bfloat16") for bits in of_groups)
        codes = unpack_int4(packed, axis, head_dim)
        group, dtype = self.group, self.dtype
        keys = dequantize_int4_groups(codes, scale, lowest, slots, group, dtype)
        return Operand(keys)


@dataclass(frozen=True)
class Int4Residual(_Int4Values, Exact):
    """The residual of `Int4`: exact keys; values are coded as in `Int4`."""

    name = "int4 residual"
    kernels_read = is_exact = False


CODECS = dict(zip(CODED, (Int8, Int4), strict=True))


def get_codec(identifier: str | Codec | None, dtype: str = "float32") -> Codec:
    """A codec by name.

    Args:
        identifier: `"float32"`, `"float16"`, `"bfloat16"`, `"float64"`, `"int8"`,
            `"int4"`, a `Codec`, or `None` for entries of `dtype` as they are.
        dtype: Dtype of the exact entries of a codec by name. float64 becomes float32
            where the backend has no float64.

    Returns:
        A `Codec`.

    Raises:
        ValueError: The name is unknown.
    """
    if isinstance(identifier, Codec):
        return identifier
    dtype = keras.backend.standardize_dtype(dtype)
    if dtype == "float64" and not current_platform().has_float64:
        dtype = "float32"
    name = dtype if identifier is None else identifier
    if isinstance(name, str) and name in CODECS:
        return CODECS[name](dtype)
    if isinstance(name, str) and name in FLOATS:
        return Exact(name)
    raise ValueError(
        f"`codec` must be one of {[*FLOATS, *CODECS]} or a Codec. Received: {name!r}"
    )
