"""What the tests of the kernels of decode attention share, and its reference."""

import attention_cases as cases
import jax
import numpy as np
import reference

from keras_kvcache.attention import Scoring, Segment, View
from keras_kvcache.attention.codecs import Exact
from keras_kvcache.attention.kernels.triton_attention import attend_by_triton
from keras_kvcache.attention.segments import DENSE, HEAD_MAJOR
from keras_kvcache.runtime.platform import has_triton

SCALE = 0.3
# Without a GPU of NVIDIA's JAX interprets the kernel for them.
INTERPRET = not has_triton()
# Segments shorter and longer than the 512 slots of a piece, and no multiple of them.
SIZES = (3, 1031, 67)
S = sum(SIZES)


def make_view(keys, values, layout="head_major"):
    """Segments of `SIZES` slots of keys `(B, S, K, H)` and values `(B, S, K, Hv)`."""
    codec, sizes = Exact(str(keys.dtype)), (keys.shape[3], values.shape[3])
    tensor = None
    if layout == "dense":
        tensor = jax.numpy.stack([keys, values], axis=1)
    segments, first = [], 0
    for size in SIZES:
        part = slice(first, first + size)
        positions = cases.int32(np.arange(first, first + size)[None])
        if layout == "dense":
            segment = Segment((tensor,), positions, DENSE, codec, *sizes, first)
        else:
            arrays = (
                jax.numpy.asarray(keys[:, part].transpose(0, 2, 3, 1)),
                jax.numpy.asarray(values[:, part].transpose(0, 2, 1, 3)),
            )
            segment = Segment(arrays, positions, HEAD_MAJOR, codec, *sizes)
        segments.append(segment)
        first += size
    return View(tuple(segments), keys.shape[2], values.shape[3])


def cut(mask):
    """A mask `(…, S)` as one for each segment."""
    ends = np.cumsum(SIZES)[:-1]
    return tuple(map(jax.numpy.asarray, np.split(mask, ends, axis=-1)))


def make_case(batch=2, length=1, heads=(6, 2), sizes=(7, 11)):
    """A query, keys and values, `heads` being `(N, K)` and `sizes` `(H, Hv)`."""
    (query_heads, kv_heads), (head_dim, value_dim) = heads, sizes
    return (
        cases.noise(batch, length, query_heads, head_dim),
        cases.noise(batch, S, kv_heads, head_dim, seed=1),
        cases.noise(batch, S, kv_heads, value_dim, seed=2),
    )


def expect(query, keys, values, mask, soft_cap=None):
    """By NumPy, with a mask that broadcasts to `(B, N, T, S)`."""
    batch, length, heads, _ = query.shape
    mask = np.broadcast_to(mask, (batch, heads, length, S))
    rows = zip(*map(np.float64, (query, keys, values)), mask, strict=True)
    attended = (
        reference.attend(*row[:3], SCALE, soft_cap=soft_cap, mask=row[3])[0]
        for row in rows
    )
    return np.stack(list(attended))


def make_spoilt_case(length, soft_cap=None, sizes=(11, 11)):
    """A case some of whose slots hold what may not count, and what comes of it.

    Of each row and key/value head, slots that no query attends hold NaN or infinite
    keys and values. One more value is NaN, and one query alone attends it.

    Returns:
        The query, keys, values, the mask `(B, N, T, S)`, and what NumPy makes of them,
        NaN for that one query.
    """
    query, keys, values = make_case(length=length, sizes=sizes)
    batch, kv_heads = len(query), keys.shape[2]
    mask = np.random.default_rng(3).random((batch, 6, length, S)) < 0.3
    mask[..., S - 5 :] = False
    mask[1, 4, 0, 611] = True
    others = np.ones((6, length), bool)
    others[4, 0] = False
    mask[1, others, 611] = False
    clean = expect(query, keys, values, mask, soft_cap)
    groups = mask.reshape(batch, kv_heads, -1, S)
    rows, heads, slots = np.nonzero(~groups.any(axis=2))
    garbage = np.where(slots % 3, np.nan, np.inf)[:, None]
    keys[rows, slots, heads] = values[rows, slots, heads] = garbage
    values[1, 611, 4 // (6 // kv_heads)] = np.nan
    clean[1, 0, 4] = np.nan
    return query, keys, values, mask, clean


def attend_by_kernel(query, view, masks, scoring=None, positions=None):
    """As `ops.attend`, by the kernel for GPUs."""
    scoring = scoring or Scoring(SCALE)
    batch, length, heads, head_dim = query.shape
    grouped = np.float32(query * scoring.scale).transpose(0, 2, 1, 3)
    grouped = grouped.reshape(batch, view.heads, -1, head_dim).astype(query.dtype)
    masks = tuple(jax.numpy.asarray(mask) for mask in masks)
    output = attend_by_triton(
        jax.numpy.asarray(grouped),
        view.segments,
        masks,
        length,
        scoring,
        positions,
        interpret=INTERPRET,
    )
    assert output.dtype == "float32"
    output = output.reshape(batch, heads, length, view.value_dim)
    return cases.numpy(output).transpose(0, 2, 1, 3)
