"""Attention over the slots of caches by a kernel of the platform's.

XLA's CPU backend reads keys and values at memory speed only where these are
head-major and float32 and each key/value head has one query, and it reads whole
buffers. `decode_attention.cc` reads them so for a few queries of any number, head-major
or dense, float32, bfloat16 or int8 with a scale for each slot, and only where something
is attended. `triton_attention.py` does for any number of queries on NVIDIA's GPUs. To
JAX they are one primitive: where a program is lowered for something else, for several
devices or to be exported, or where it's differentiated, `attend_segments` stands in
its place.
"""

import functools
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from keras_kvcache.ops.native import load_handler
from keras_kvcache.ops.online_softmax import attend_segments
from keras_kvcache.ops.platform import has_triton, is_jax_on_cpu
from keras_kvcache.ops.products import (
    Read,
    dense_segment,
    head_major_segment,
    is_few,
    sum_dtype,
)
from keras_kvcache.ops.scoring import Scoring
from keras_kvcache.ops.triton_attention import attend_by_triton, suits_triton
from keras_kvcache.ops.view import slots_of

NAME = "keras_kvcache_decode_attention"
SOURCE = Path(__file__).with_suffix(".cc")

# Of what a slot holds; int16 for the bits of bfloat16.
DTYPES = ("float32", "bfloat16", "int16", "int8")
GPU_DTYPES = (*DTYPES, "float16")


def has_decode_kernel(query, segments, masks, value_dim, scoring):
    """Whether `decode_attention` can be called, and is the fastest way.

    Args:
        query: Tensor `(B, K, R, H)`.
        segments: Tuple of `Segment`.
        masks: As in `decode_attention`.
        value_dim: `Hv`.
        scoring: A `Scoring`; a bias that is a function is not for kernels.
    """
    if scoring.function is not None:
        return False
    on_gpu = has_triton()
    # XLA can't cut the call into parts for several devices.
    on_cpu = is_jax_on_cpu() and jax.device_count() == 1
    if not (on_gpu or on_cpu) or sum_dtype(query) != "float32":
        return False
    if any(segment.arrays is None for segment in segments):
        return False
    arrays = [array for segment in segments for array in segment.arrays]
    arrays += [x for x in (*masks, scoring.table) if x is not None]
    # Sizes that are symbols, as in an export, aren't integers.
    known = all(isinstance(n, int) for array in (query, *arrays) for n in array.shape)
    if not known:
        return False
    if on_gpu:
        return suits_triton(query, arrays, value_dim)
    return is_few(query) and load_handler(NAME, SOURCE, "DecodeAttention") is not None


def decode_attention(query, segments, masks, value_dim, length, scoring, positions):
    """Attention as by `attend_segments`, whose arguments these are.

    Args:
        query: `(B, K, R, H)`, scaled, no wider than float32; on JAX, as is all else.
        segments: Tuple of `Segment` with `arrays`. A piece of them, such as 512 slots
            or 64 of a dense tensor on a CPU, isn't read if it lies before the first
            slot that is attended or past the last.
        masks: One boolean mask `(1 | B, 1 | N, 1 | T, 1 | n)` or `None` a segment.
        value_dim: `Hv`.
        length: `T`.
        scoring: A `Scoring`, whose bias is a table or `None`.
        positions: int32 `(1 | B, T)`, positions of the queries, which a bias needs.

    Returns:
        float32 `(B, K, R, Hv)`, rounded to the dtype of the queries on a GPU; zero for
        a query with nothing to attend.
    """
    operands = [query.astype("float32") if is_jax_on_cpu() else query]
    for segment, mask in zip(segments, masks, strict=True):
        slots = segment.positions.shape[1]
        if mask is None:
            mask = jax.numpy.ones((1, 1, 1, 1), bool)
        mask = jax.numpy.broadcast_to(mask.astype(bool), (*mask.shape[:3], slots))
        operands += [*segment.arrays, mask]
    if scoring.table is not None:
        slots = (segment.positions for segment in segments)
        operands += [scoring.table.astype("float32"), positions, *slots]
    if scoring.sink is not None:
        operands.append(scoring.sink.astype("float32"))
    return _run(
        *operands,
        starts=tuple(segment.start for segment in segments),
        value_dim=value_dim,
        length=length,
        soft_cap=scoring.soft_cap,
        has_bias=scoring.table is not None,
        has_sink=scoring.sink is not None,
        block=segments[0].block,
    )


# Compiled when it's called outside of a program, too.
@functools.partial(
    jax.jit,
    static_argnames=(
        *("starts", "value_dim", "length", "soft_cap", "block"),
        *("has_bias", "has_sink"),
    ),
    inline=True,
)
def _run(*operands, **parameters):
    return _primitive.bind(*operands, **parameters)


class _Bias(NamedTuple):
    """What the kernel gets of a bias."""

    table: Any  # (N, distances)
    positions: Any  # of the queries, (1 | B, T)
    slots: Any  # positions of each segment's slots, (1 | B, n)


class _Operands(NamedTuple):
    """What the kernel gets of a segment."""

    arrays: tuple  # as in `Segment`
    mask: Any
    start: int

    @property
    def is_dense(self):
        """Whether keys and values are in one tensor, which holds no codes."""
        return self.arrays[0].ndim == 5

    def halves(self):
        """The arrays of keys and those of values, if each have their own."""
        half = len(self.arrays) // 2
        return self.arrays[:half], self.arrays[half:]

    def expected(self, query, value_dim):
        """Shapes and dtypes that the arrays must have."""
        batch, heads, _, head_dim = query.shape
        dtype = str(self.arrays[0].dtype)
        dtypes = DTYPES if is_jax_on_cpu() else GPU_DTYPES
        dtype = dtype if dtype in dtypes else dtypes[0]
        if self.is_dense:
            dtype = dtypes[0] if dtype == "int8" else dtype
            return [((batch, 2, self.arrays[0].shape[2], heads, head_dim), dtype)]
        slots = self.mask.shape[3]
        shapes = [
            *((batch, heads, n, slots) for n in (head_dim, 1)),
            *((batch, heads, slots, n) for n in (value_dim, 1)),
        ]
        if dtype == "int8":
            return list(zip(shapes, [dtype, "float32"] * 2, strict=True))
        return [(shape, dtype) for shape in shapes[::2]]

    def segment(self, block, positions):
        """A segment whose products the backend's operations make."""
        if not self.is_dense:
            keys, values = self.halves()
            reads = _reader(keys, axis=3), _reader(values, axis=2)
            return head_major_segment(*reads, positions, block)
        (tensor,) = self.arrays
        reads = (_dense_reader(tensor, self.start, half) for half in (0, 1))
        return dense_segment(*reads, positions, tensor.shape[3])


def _of_segments(operands, starts):
    """The `_Operands` of each segment; what is left of the operands is ignored."""
    operands = list(operands)
    for start in starts:
        count = 1 if operands[0].ndim == 5 else 4 if operands[0].dtype == "int8" else 2
        yield _Operands(tuple(operands[:count]), operands[count], start)
        operands = operands[count + 1 :]


def _of_scoring(operands, starts, has_bias, has_sink):
    """The `_Bias` or `None`, and the sink or `None`."""
    sink = operands[-1] if has_sink else None
    if not has_bias:
        return None, sink
    end = len(operands) - has_sink
    table, positions, *slots = operands[end - len(starts) - 2 : end]
    return _Bias(table, positions, slots), sink


def _stand_in(
    query, *operands, starts, value_dim, length, soft_cap, has_bias, has_sink, block
):
    """The same by the backend's operations."""
    bias, sink = _of_scoring(operands, starts, has_bias, has_sink)
    scoring = Scoring(1.0, soft_cap, bias and bias.table, sink)
    segments, masks = [], []
    for number, operand in enumerate(_of_segments(operands, starts)):
        slots = jax.numpy.arange(operand.mask.shape[3])[None]
        slots = slots if bias is None else bias.slots[number]
        segments.append(operand.segment(block, slots))
        masks.append(operand.mask)
    positions = bias and bias.positions
    return attend_segments(
        query, segments, masks, value_dim, length, scoring, positions
    )


def _reader(arrays, axis):
    """A function that reads slots on an axis, of which segments are made.

    It cuts what is asked for and no more, as it's traced where a hidden segment is
    skipped.
    """

    def read(first, count):
        matrix, *scales = (slots_of(array, first, count, axis) for array in arrays)
        return Read(_as_bfloat16(matrix).astype("float32"), *scales)

    return read


def _dense_reader(tensor, start, half):
    """The same for slots from `start` on of the keys (0) or values (1) of a tensor."""

    def read(first, count):
        part = slots_of(tensor, start + first, count, axis=2)[:, half]
        return _as_bfloat16(part).astype("float32")

    return read


def _output_shape(query, *operands, starts, value_dim, length, **parameters):
    """What comes out; the kernel, which has bare addresses, relies on the checks."""
    batch, heads, rows, head_dim = query.shape
    for segment in _of_segments(operands, starts):
        expected = segment.expected(query, value_dim)
        received = [(array.shape, str(array.dtype)) for array in segment.arrays]
        if received != expected or (segment.is_dense and value_dim != head_dim):
            raise ValueError(
                f"`segments` must have arrays of {expected} for a query of shape "
                f"{query.shape} and values of size {value_dim}. Received: {received}"
            )
        mask, slots = segment.mask, segment.mask.shape[3]
        shape = (batch, rows // length * heads, length, slots)
        fits = all(
            n in (1, wanted) for n, wanted in zip(mask.shape, shape, strict=True)
        )
        end = segment.start + slots
        held = segment.arrays[0].shape[2] if segment.is_dense else slots
        if not 0 <= segment.start <= end <= held:
            raise ValueError(
                f"`segments` must lie within the {held} slots of their arrays. "
                f"Received: slots {segment.start} to {end}"
            )
        if not fits or mask.dtype != bool:
            raise ValueError(
                f"`masks` must be boolean and broadcast to (B, N, T, n) = {shape}. "
                f"Received: {mask.dtype}, {mask.shape}"
            )
    return query.update(
        shape=(batch, heads, rows, value_dim), dtype=np.dtype("float32")
    )


def _differentiate(primals, tangents, **parameters):
    tangents = tuple(map(ad.instantiate_zeros, tangents))
    return jax.jvp(functools.partial(_stand_in, **parameters), primals, tangents)


def _map(operands, axes, **parameters):
    stand_in = functools.partial(_stand_in, **parameters)
    return jax.vmap(stand_in, in_axes=axes)(*operands), 0


def _by_triton(
    query, *operands, starts, value_dim, length, soft_cap, has_bias, has_sink, block
):
    """The same by the kernel for GPUs."""
    bias, sink = _of_scoring(operands, starts, has_bias, has_sink)
    scoring = Scoring(1.0, soft_cap, bias and bias.table, sink)
    slots = (None,) * len(starts) if bias is None else bias.slots
    segments = [
        (tuple(map(_as_bfloat16, operand.arrays)), operand.start, operand.mask, slots)
        for operand, slots in zip(_of_segments(operands, starts), slots, strict=True)
    ]
    positions = bias and bias.positions
    return attend_by_triton(query, segments, length, value_dim, scoring, positions)


def _as_bfloat16(array):
    """Numbers of which the array may hold the bits."""
    return array.view("bfloat16") if array.dtype == "int16" else array


_lower_stand_in = mlir.lower_fun(_stand_in, multiple_results=False)
_lower_by_triton = mlir.lower_fun(_by_triton, multiple_results=False)


def _is_export(context):
    """Whether others will load the program, who may not have what it would call."""
    return context.module_context.lowering_parameters.for_export


def _lower_for_gpu(context, *operands, **parameters):
    # Some contexts name no number: those of programs for one device each.
    devices = getattr(context.module_context.axis_context, "num_devices", 1)
    stands_in = _is_export(context) or devices > 1 or not has_triton()
    lower = _lower_stand_in if stands_in else _lower_by_triton
    with warnings.catch_warnings():
        # Users can't act on it; `triton_attention.py` says what replaces the backend.
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated")
        return lower(context, *operands, **parameters)


def _lower_for_cpu(context, *operands, **parameters):
    # XLA knows the C++ kernel only where the CPU is JAX's default.
    if _is_export(context) or not is_jax_on_cpu():
        return _lower_stand_in(context, *operands, **parameters)
    attributes = dict(
        starts=np.array(parameters["starts"], np.int64),
        length=np.int64(parameters["length"]),
        soft_cap=np.float32(parameters["soft_cap"] or 0),
        has_bias=parameters["has_bias"],
        has_sink=parameters["has_sink"],
    )
    return jax.ffi.ffi_lowering(NAME)(context, *operands, **attributes)


_primitive = Primitive(NAME)
_primitive.def_abstract_eval(_output_shape)
_primitive.def_impl(_stand_in)  # for `jax.disable_jit` and `jax.checkpoint`
ad.primitive_jvps[_primitive] = _differentiate
batching.primitive_batchers[_primitive] = _map
mlir.register_lowering(_primitive, _lower_stand_in)
mlir.register_lowering(_primitive, _lower_for_cpu, platform="cpu")
mlir.register_lowering(_primitive, _lower_for_gpu, platform="cuda")
