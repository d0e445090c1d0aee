"""Attention of few queries over head-major slots, by a kernel for CPUs.

XLA's CPU backend reads keys and values at memory speed only where these are float32
and each key/value head has one query, and it reads whole buffers. The kernel,
`decode_attention.cc`, reads them so for a few queries of any number, float32, bfloat16
or int8 with a scale for each slot, and only where something is attended. To JAX it's
a primitive: where a program is lowered for something else, or to be exported, or
where it's differentiated, `attend_segments` stands in its place.
"""

import functools
from pathlib import Path

import jax
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from keras_kvcache.ops.native import load_library
from keras_kvcache.ops.online_softmax import attend_segments
from keras_kvcache.ops.platform import is_jax_on_cpu
from keras_kvcache.ops.products import (
    Read,
    head_major_segment,
    is_few,
    slots_of,
    sum_dtype,
)

NAME = "keras_kvcache_decode_attention"


def has_decode_kernel(query, segments):
    """Whether `decode_attention` can be called, and is the fastest way.

    Args:
        query: Tensor `(B, K, R, H)`.
        segments: Tuple of `Segment`.
    """
    # XLA can't cut the call into parts for several devices.
    if not is_jax_on_cpu() or jax.device_count() > 1:
        return False
    if not is_few(query) or sum_dtype(query) != "float32":
        return False
    if any(segment.arrays is None for segment in segments):
        return False
    arrays = [array for segment in segments for array in segment.arrays]
    # Sizes that are symbols, as in an export, aren't integers.
    known = all(isinstance(n, int) for array in (query, *arrays) for n in array.shape)
    return known and _is_registered()


def decode_attention(query, segments, masks, value_dim, length, soft_cap=None):
    """Attention as by `attend_segments`, whose arguments these are.

    Args:
        query: `(B, K, R, H)`, scaled, no wider than float32; on JAX, as is all else.
        segments: Tuple of `Segment` with `arrays`. Of 512 slots none before the first
            or past the last that is attended is read.
        masks: One boolean mask `(1 | B, 1 | N, 1 | T, 1 | n)` or `None` a segment.
        value_dim: `Hv`.
        length: `T`.
        soft_cap: As in `attend`.

    Returns:
        float32 `(B, K, R, Hv)`; zero for a query with nothing to attend.
    """
    operands = [query.astype("float32")]
    for segment, mask in zip(segments, masks, strict=True):
        slots = segment.arrays[0].shape[3]
        if mask is None:
            mask = jax.numpy.ones((1, 1, 1, 1), bool)
        mask = jax.numpy.broadcast_to(mask.astype(bool), (*mask.shape[:3], slots))
        operands += [*segment.arrays, mask]
    parameters = dict(value_dim=value_dim, length=length, soft_cap=soft_cap)
    return _run(*operands, block=segments[0].block, **parameters)


# Compiled when it's called outside of a program, too.
@functools.partial(
    jax.jit, static_argnames=("value_dim", "length", "soft_cap", "block"), inline=True
)
def _run(*operands, **parameters):
    return _primitive.bind(*operands, **parameters)


def _of_segments(operands):
    """The arrays of keys, those of values and the mask of each segment."""
    operands = list(operands)
    while operands:
        half = 2 if operands[0].dtype == "int8" else 1
        yield operands[:half], operands[half : 2 * half], operands[2 * half]
        operands = operands[2 * half + 1 :]


def _stand_in(query, *operands, value_dim, length, soft_cap, block):
    """The same by the backend's operations."""
    segments, masks = [], []
    for keys, values, mask in _of_segments(operands):
        positions = jax.numpy.arange(keys[0].shape[3])[None]
        reads = _reader(*keys, axis=3), _reader(*values, axis=2)
        segments.append(head_major_segment(*reads, positions, block))
        masks.append(mask)
    return attend_segments(query, segments, masks, value_dim, length, soft_cap)


def _reader(entries, scales=None, *, axis):
    """A function that reads slots on an axis, as `head_major_segment` takes it."""

    def read(first, count):
        matrix = slots_of(entries, first, count, axis)
        if matrix.dtype == "int16":
            matrix = matrix.view("bfloat16")
        matrix = matrix.astype("float32")
        if scales is None:
            return Read(matrix)
        return Read(matrix, slots_of(scales, first, count, axis))

    return read


def _output_shape(query, *operands, value_dim, length, **parameters):
    """What comes out; the kernel, which has bare addresses, relies on the checks."""
    batch, heads, rows, head_dim = query.shape
    for keys, values, mask in _of_segments(operands):
        slots, dtypes = keys[0].shape[-1], (str(keys[0].dtype), "float32")
        expected = [
            *zip(
                [(batch, heads, n, slots) for n in (head_dim, 1)], dtypes, strict=True
            ),
            *zip(
                [(batch, heads, slots, n) for n in (value_dim, 1)], dtypes, strict=True
            ),
        ]
        expected = expected[:: 2 // len(keys)]  # Scales come second, if at all.
        received = [(array.shape, str(array.dtype)) for array in (*keys, *values)]
        if received != expected:
            raise ValueError(
                f"`segments` must have arrays of {expected} for a query of shape "
                f"{query.shape}. Received: {received}"
            )
        shape = (batch, rows // length * heads, length, slots)
        fits = all(
            n in (1, wanted) for n, wanted in zip(mask.shape, shape, strict=True)
        )
        if not fits or mask.shape[3] != slots or mask.dtype != bool:
            raise ValueError(
                f"`masks` must be boolean and broadcast to (B, N, T, n) = {shape}. "
                f"Received: {mask.dtype}, {mask.shape}"
            )
    return query.update(shape=(batch, heads, rows, value_dim))


def _differentiate(primals, tangents, **parameters):
    tangents = tuple(map(ad.instantiate_zeros, tangents))
    return jax.jvp(functools.partial(_stand_in, **parameters), primals, tangents)


def _map(operands, axes, **parameters):
    stand_in = functools.partial(_stand_in, **parameters)
    return jax.vmap(stand_in, in_axes=axes)(*operands), 0


_lower_stand_in = mlir.lower_fun(_stand_in, multiple_results=False)


def _lower(context, *operands, **parameters):
    if context.module_context.lowering_parameters.for_export:
        # A program that others load may call nothing that they don't have.
        return _lower_stand_in(context, *operands, **parameters)
    length, soft_cap = parameters["length"], parameters["soft_cap"]
    attributes = dict(length=np.int64(length), soft_cap=np.float32(soft_cap or 0))
    return jax.ffi.ffi_lowering(NAME)(context, *operands, **attributes)


@functools.cache
def _is_registered():
    """Whether XLA knows the kernel, which is compiled for it now if need be."""
    library = load_library(Path(__file__).with_suffix(".cc"))
    if library is None:
        return False
    capsule = jax.ffi.pycapsule(library.DecodeAttention)
    jax.ffi.register_ffi_target(NAME, capsule, platform="cpu")
    return True


_primitive = Primitive(NAME)
_primitive.def_abstract_eval(_output_shape)
_primitive.def_impl(_stand_in)  # for `jax.disable_jit` and `jax.checkpoint`
ad.primitive_jvps[_primitive] = _differentiate
batching.primitive_batchers[_primitive] = _map
mlir.register_lowering(_primitive, _lower_stand_in)
mlir.register_lowering(_primitive, _lower, platform="cpu")
