"""The kernel for GPUs, as JAX interprets it on a CPU: its numbers, and where it's used.

What Triton makes of it is `test_gpu_programs.py`'s.
"""

import attention_cases as cases
import jax
import keras
import numpy as np
import pytest
from kernel_cases import SCALE, S, cut, expect, make_case, make_view

from keras_kvcache.caches import CacheSpec
from keras_kvcache.caches.sizes import segment_sizes
from keras_kvcache.ops import View, platform, view_masks
from keras_kvcache.ops.decode_attention import has_decode_kernel
from keras_kvcache.ops.triton_attention import (
    PART,
    attend_by_triton,
    choose_tiling,
    suits_triton,
)

pytestmark = pytest.mark.jax_only


def attend(query, view, masks, soft_cap=None):
    """As `ops.attend`, by the kernel."""
    batch, length, heads, head_dim = query.shape
    grouped = np.float32(query * SCALE).transpose(0, 2, 1, 3)
    grouped = grouped.reshape(batch, view.heads, -1, head_dim).astype(query.dtype)
    segments = [
        (segment.arrays, segment.start, jax.numpy.asarray(mask))
        for segment, mask in zip(view.segments, masks, strict=True)
    ]
    output = attend_by_triton(
        jax.numpy.asarray(grouped),
        segments,
        length,
        view.value_dim,
        soft_cap,
        interpret=True,
    )
    assert output.dtype == "float32"
    output = output.reshape(batch, heads, length, view.value_dim)
    return cases.numpy(output).transpose(0, 2, 1, 3)


def check(got, expected, atol=1e-5):
    np.testing.assert_allclose(got, expected, rtol=0, atol=atol)


@pytest.mark.parametrize(
    "layout, sizes",
    [
        *(("head_major", sizes) for sizes in [(7, 11), (64, 64), (131, 3)]),
        *(("dense", (size, size)) for size in (7, 64)),
    ],
)
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (5, 1)])
def test_equals_attention_in_numpy(heads, layout, sizes):
    query, keys, values = make_case(heads=heads, sizes=sizes)
    mask = np.arange(S) < np.reshape([S, 601], (2, 1, 1, 1))
    output = attend(query, make_view(keys, values, layout), cut(mask))
    check(output, expect(query, keys, values, mask))


@pytest.mark.parametrize("soft_cap", [None, 1.5])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("length", [5, 43])
def test_each_query_has_its_mask(length, per_row, per_head, soft_cap):
    query, keys, values = make_case(length=length)
    shape = (2 if per_row else 1, 6 if per_head else 1, length, S)
    mask = np.random.default_rng(3).random(shape) < 0.3
    output = attend(query, make_view(keys, values), cut(mask), soft_cap)
    check(output, expect(query, keys, values, mask, soft_cap))


@pytest.mark.parametrize("layout", ["head_major", "dense"])
def test_what_is_hidden_is_not_touched(layout):
    """Not by a factor of zero either; a query with nothing to attend gives zeros."""
    query, keys, values = make_case(sizes=(7, 7))
    mask = np.zeros((2, 1, 1, S), bool)
    mask[0, ..., 40:97] = True
    keys[:, 97:], keys[:, :40] = np.nan, np.inf
    values[:, 97:], values[:, :40] = np.inf, np.nan
    output = attend(query, make_view(keys, values, layout), cut(mask))
    keys, values = np.nan_to_num(keys, posinf=0), np.nan_to_num(values, posinf=0)
    check(output[:1], expect(query, keys, values, mask)[:1])
    assert (output[1] == 0).all()


@pytest.mark.parametrize("codec", ["bfloat16", "int8"])
@pytest.mark.parametrize("layout", ["head_major", "dense"])
def test_narrow_slots_are_what_they_stand_for(codec, layout):
    query, keys, values = make_case(sizes=(64, 64))
    keys *= np.linspace(0.5, 2, S, dtype="float32")[:, None, None]
    values *= np.linspace(2, 0.5, S, dtype="float32")[:, None, None]
    cache = CacheSpec(2, S, 2, 64, layout=layout, codec=codec).allocate()
    cache, _ = cache.update(*map(jax.numpy.asarray, (keys, values)), 0)
    view = cache.view(cases.int32([S, 601]))
    if codec == "bfloat16":  # A CPU keeps its bits.
        segments = (
            segment._replace(arrays=tuple(a.view(codec) for a in segment.arrays))
            for segment in view.segments
        )
        view = View(tuple(segments), *view[1:])
    masks = view_masks(view, cases.int32([[S + 2]]), sliding_window=S + 2 - 337)
    mask = np.arange(S) < np.reshape([S, 601], (2, 1, 1, 1))
    mask &= np.arange(S) > 337
    keys, values = (cases.numpy(entries)[:, :S] for entries in cache.storage.decode())
    expected = expect(query, keys, values, mask)
    check(attend(query, view, masks), expected)
    # Queries as narrow as an accelerator has them are multiplied so.
    narrow = attend(query.astype(jax.numpy.bfloat16), view, masks)
    check(narrow, expected, atol=0.02)


@pytest.mark.parametrize("heads, slots", [(8, 8192), (256, 8192), (5000, 257)])
@pytest.mark.parametrize("rows", [1, 4, 63, 2048])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_programs_share_out_all_slots_and_queries(dtype, heads, rows, slots):
    tiling = choose_tiling(heads, rows, slots, 96, dtype)
    assert tiling.part % tiling.tile == 0 and tiling.tile & (tiling.tile - 1) == 0
    assert (tiling.parts - 1) * tiling.part < slots <= tiling.parts * tiling.part
    assert tiling.part >= PART or tiling.parts == 1
    assert tiling.parts * heads * tiling.groups <= 1024 or tiling.parts == 1
    assert (tiling.groups - 1) * tiling.queries < rows
    assert rows <= tiling.groups * tiling.queries


def test_gpus_of_nvidia_have_triton(on_gpu, monkeypatch):
    assert platform.has_triton()
    on_gpu.compute_capability = "7.5"
    assert not platform.has_triton()
    on_gpu.compute_capability = "12.0"
    assert platform.has_triton()
    monkeypatch.setattr(keras.distribution, "distribution", lambda: "spread")
    assert not platform.has_triton()
    monkeypatch.undo()
    assert not platform.has_triton()


def test_gpus_of_others_have_none(on_gpu):
    on_gpu.client.platform_version = "PJRT C API\nrocm 60443484"
    on_gpu.compute_capability = "gfx942"
    assert not platform.has_triton()


@pytest.mark.usefixtures("on_gpu")
def test_it_is_used_where_there_is_triton():
    query, keys, values = make_case()
    segments = make_view(keys, values).segments
    grouped = jax.numpy.zeros((2, 2, 3, 7))
    assert has_decode_kernel(grouped, segments, 11)
    without = [segment._replace(arrays=None) for segment in segments]
    assert not has_decode_kernel(grouped, without, 11)
    assert segment_sizes(S) == (S,)


@pytest.mark.parametrize(
    "dtype, slots, head_dim, expected",
    [
        ("bfloat16", 2**25, 64, True),
        ("int8", 2**23, 64, True),
        ("int8", 2**24, 64, False),  # which Pallas can't count
        ("bfloat16", 512, 256, True),
        ("bfloat16", 512, 257, False),  # whose tiles take too much room
    ],
)
def test_what_is_too_large_is_not_for_it(dtype, slots, head_dim, expected):
    query = jax.ShapeDtypeStruct((1, 2, 3, head_dim), "bfloat16")
    array = jax.ShapeDtypeStruct((1, 2, head_dim, slots), dtype)
    assert suits_triton(query, [array], 64) == expected
