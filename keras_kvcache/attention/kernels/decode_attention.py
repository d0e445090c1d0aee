"""Attention over the slots of caches by the platform's kernel.

XLA's CPU backend reads keys and values at memory speed only where these are
head-major and float32 and each key/value head has one query, and it reads whole
buffers. `decode_attention.cc` reads them so for a few queries of any number, float32 or
bfloat16, head-major or dense, or head-major int8 with its scales, and only where
something is attended. `triton_attention.py` does for any number of queries on
NVIDIA's GPUs. To JAX they are one primitive: where a program is lowered for something
else, for several devices or to be exported, or where it's differentiated,
`attend_segments` stands in its place.
"""

import functools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from keras_kvcache.attention.kernels.triton_attention import (
    attend_by_triton,
    suits_triton,
)
from keras_kvcache.attention.masks import whole_mask
from keras_kvcache.attention.products import is_few, sum_dtype
from keras_kvcache.attention.scoring import Scoring
from keras_kvcache.attention.segments import DENSE_PAIR, Segment
from keras_kvcache.attention.softmax import attend_segments
from keras_kvcache.runtime.native import load_handler
from keras_kvcache.runtime.platform import current_platform

NAME = "keras_kvcache_decode_attention"
SOURCE = Path(__file__).with_suffix(".cc")


def suits_kernel(
    query: Any, segments: Sequence[Segment], masks: Sequence[Any], scoring: Scoring
) -> bool:
    """Whether a kernel can attend these segments and is faster than the plain path.

    Kernels read segments whose codec says so, in any layout but a pair of dense
    tensors, of sizes that are known; they take tables for a bias and no functions.

    Args:
        query: Tensor `(B, K, R, H)`.
        segments: Tuple of `Segment`.
        masks, scoring: As in `decode_attention`.
    """
    kernel = current_platform().kernel
    if kernel is None or sum_dtype(query) != "float32":
        return False
    if scoring.function is not None or not all(
        segment.codec.kernels_read and segment.layout != DENSE_PAIR
        for segment in segments
    ):
        return False
    arrays = jax.tree_util.tree_leaves(([s.arrays for s in segments], masks, scoring))
    # Sizes that are symbols, as in an export, aren't integers.
    known = all(isinstance(n, int) for array in (query, *arrays) for n in array.shape)
    if not known:
        return False
    if kernel == "gpu":
        return suits_triton(query, arrays, segments[0].value_dim)
    return is_few(query) and load_handler(NAME, SOURCE, "DecodeAttention") is not None


def decode_attention(
    query: Any,
    segments: Sequence[Segment],
    masks: Sequence[Any],
    length: int,
    scoring: Scoring,
    positions: Any,
) -> Any:
    """Attention by a kernel; arguments as of `attend_segments`.

    A piece of a segment, such as 512 slots or 64 of a dense tensor on a CPU, isn't read
    if it lies before the first slot that is attended or past the last.

    Returns:
        float32 `(B, K, R, Hv)`, rounded to the dtype of the queries on a GPU; zero for
        a query with nothing to attend.
    """
    masks = tuple(mask if mask is None else mask.astype(bool) for mask in masks)
    operands = (query, tuple(segments), masks, scoring, positions)
    operands, tree = jax.tree_util.tree_flatten(operands)
    return _run(*operands, tree=tree, length=length)


# Compiled when it's called outside of a program, too.
@functools.partial(jax.jit, static_argnames=("tree", "length"), inline=True)
def _run(*operands, **parameters):
    return _primitive.bind(*operands, **parameters)


def _plain(*operands, tree, length):
    """The plain path, which stands in for the kernels."""
    query, segments, masks, scoring, positions = tree.unflatten(operands)
    return attend_segments(query, segments, masks, length, scoring, positions)


def _by_cpu_kernel(*operands, tree, length):
    """Calls the kernel in C++.

    Its operands are the query; the arrays and the mask of each segment; the table of a
    bias, positions of the queries and of the slots of each segment; the sink.
    """
    query, segments, masks, scoring, positions = tree.unflatten(operands)
    operands = [query.astype("float32")]
    for segment, mask in zip(segments, masks, strict=True):
        operands += [*segment.arrays, whole_mask(segment, mask)]
    if scoring.bias is not None:
        slots = (segment.positions for segment in segments)
        operands += [scoring.bias.astype("float32"), positions, *slots]
    if scoring.sink is not None:
        operands.append(scoring.sink.astype("float32"))
    shape = (*query.shape[:3], segments[0].value_dim)
    call = jax.ffi.ffi_call(NAME, jax.ShapeDtypeStruct(shape, "float32"))
    return call(
        *operands,
        offsets=np.array([segment.array_offset for segment in segments], np.int64),
        is_dense=np.array(
            [segment.layout.is_one_tensor for segment in segments], np.int64
        ),
        length=np.int64(length),
        soft_cap=np.float32(scoring.soft_cap or 0),
        has_bias=scoring.bias is not None,
        has_sink=scoring.sink is not None,
    )


def _by_gpu_kernel(*operands, tree, length):
    """Calls the kernel for GPUs."""
    query, segments, masks, scoring, positions = tree.unflatten(operands)
    return attend_by_triton(query, segments, masks, length, scoring, positions)


def _output_shape(*operands, tree, length):
    """Abstract evaluation: the output's shape, and the checks.

    Kernels see raw pointers and rely on these checks.
    """
    query, segments, masks, scoring, positions = tree.unflatten(operands)
    batch, heads, queries, head_dim = query.shape
    value_dim = segments[0].value_dim
    for segment, mask in zip(segments, masks, strict=True):
        _check_arrays(segment, batch, heads, (head_dim, value_dim))
        slots = segment.positions.shape[1]
        shape = (batch, queries // length * heads, length, slots)
        _check_broadcast("masks", "(B, N, T, n)", mask, shape)
        if scoring.bias is not None:
            letters, shape = "positions (B, n)", (batch, slots)
            _check_broadcast("segments", letters, segment.positions, shape)
    if scoring.bias is not None:
        _check_broadcast("positions", "(B, T)", positions, (batch, length))
    return query.update(
        shape=(batch, heads, queries, value_dim), dtype=np.dtype("float32")
    )


def _check_arrays(segment, batch, heads, sizes):
    """Refuses a segment whose arrays aren't what its layout and codec say."""
    layout, slots = segment.layout, segment.positions.shape[1]
    # A dense tensor may have more slots than the segment.
    held = segment.arrays[0].shape[layout.keys.slots] if layout.is_one_tensor else slots
    expected = [
        (layout.shape(coded, axes, batch, heads, held), coded.dtype)
        for coded, axes in layout.arrays(segment.codec, *sizes)
    ]
    received = [(array.shape, str(array.dtype)) for array in segment.arrays]
    of_segment = (segment.head_dim, segment.value_dim)
    is_unlike = layout.is_one_tensor and sizes[0] != sizes[1]
    if received != expected or of_segment != sizes or is_unlike:
        raise ValueError(
            f"`segments` must have arrays of {expected} for keys and values of sizes "
            f"{sizes}. Received: {received} for {of_segment}"
        )
    if not 0 <= segment.array_offset <= segment.array_offset + slots <= held:
        raise ValueError(
            f"`segments` must lie within the {held} slots of their arrays. Received: "
            f"slots {segment.array_offset} to {segment.array_offset + slots}"
        )


def _check_broadcast(name, letters, array, shape):
    """Refuses an array that doesn't broadcast to a shape; `None` passes."""
    if array is not None and not all(
        n in (1, wanted) for n, wanted in zip(array.shape, shape, strict=True)
    ):
        raise ValueError(
            f"`{name}` must broadcast to {letters} = {shape}. Received: {array.shape}"
        )


def _differentiate(primals, tangents, **parameters):
    tangents = tuple(map(ad.instantiate_zeros, tangents))
    return jax.jvp(functools.partial(_plain, **parameters), primals, tangents)


def _map(operands, axes, **parameters):
    plain = functools.partial(_plain, **parameters)
    return jax.vmap(plain, in_axes=axes)(*operands), 0


_lower_plain = mlir.lower_fun(_plain, multiple_results=False)
_lower_cpu_kernel = mlir.lower_fun(_by_cpu_kernel, multiple_results=False)
_lower_gpu_kernel = mlir.lower_fun(_by_gpu_kernel, multiple_results=False)


def _lower_for_gpu(context, *operands, **parameters):
    # Some contexts name no number: those of programs for one device each.
    devices = getattr(context.module_context.axis_context, "num_devices", 1)
    is_plain = _is_export(context) or devices > 1 or current_platform().kernel != "gpu"
    with warnings.catch_warnings():
        # Users can't act on it; `triton_attention.py` says what replaces the backend.
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated")
        lower = _lower_plain if is_plain else _lower_gpu_kernel
        return lower(context, *operands, **parameters)


def _lower_for_cpu(context, *operands, **parameters):
    # XLA knows the C++ kernel only where the CPU is JAX's default.
    is_plain = _is_export(context) or current_platform().kernel != "cpu"
    lower = _lower_plain if is_plain else _lower_cpu_kernel
    return lower(context, *operands, **parameters)


def _is_export(context):
    """Whether the program is exported: who loads it may lack the kernel."""
    return context.module_context.lowering_parameters.for_export


_primitive = Primitive(NAME)
_primitive.def_abstract_eval(_output_shape)
_primitive.def_impl(_plain)  # for `jax.disable_jit` and `jax.checkpoint`
ad.primitive_jvps[_primitive] = _differentiate
batching.primitive_batchers[_primitive] = _map
mlir.register_lowering(_primitive, _lower_plain)
mlir.register_lowering(_primitive, _lower_for_cpu, platform="cpu")
mlir.register_lowering(_primitive, _lower_for_gpu, platform="cuda")
