"""The kernel for GPUs: its numbers, and where it's used.

On a GPU of NVIDIA's it runs; elsewhere JAX interprets it, and what Triton makes of it
is `test_gpu_programs.py`'s.
"""

from dataclasses import replace

import attention_cases as cases
import jax
import keras
import numpy as np
import pytest
import reference_codecs
from kernel_cases import (
    INTERPRET,
    SCALE,
    S,
    cut,
    expect,
    make_case,
    make_spoilt_case,
    make_view,
)
from kernel_cases import attend_by_kernel as attend

from keras_kvcache.attention import Scoring, Segment, View, view_masks
from keras_kvcache.attention.codecs import AsGiven, Exact
from keras_kvcache.attention.kernels.decode_attention import suits_kernel
from keras_kvcache.attention.kernels.triton_attention import (
    PART,
    attend_by_triton,
    choose_tiling,
    suits_triton,
)
from keras_kvcache.attention.segments import HEAD_MAJOR
from keras_kvcache.caches import CacheSpec
from keras_kvcache.runtime import platform

pytestmark = pytest.mark.jax_only


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


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("length, soft_cap", [(5, None), (43, 1.5)])
def test_each_query_has_its_mask(length, per_row, per_head, soft_cap):
    query, keys, values = make_case(length=length)
    shape = (2 if per_row else 1, 6 if per_head else 1, length, S)
    mask = np.random.default_rng(3).random(shape) < 0.3
    output = attend(query, make_view(keys, values), cut(mask), Scoring(SCALE, soft_cap))
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


@pytest.mark.parametrize("length", [1, 29])
@pytest.mark.parametrize("layout", ["head_major", "dense"])
def test_what_is_hidden_never_counts(layout, length):
    """Whatever it holds, be it hidden from all queries or from all but one."""
    query, keys, values, mask, expected = make_spoilt_case(length)
    check(attend(query, make_view(keys, values, layout), cut(mask)), expected)


@pytest.mark.parametrize("codec, layout", cases.stored(["bfloat16", "int8"]))
def test_narrow_slots_are_what_they_stand_for(codec, layout):
    query, keys, values = make_case(sizes=(64, 64))
    keys *= np.linspace(0.5, 2, S, dtype="float32")[:, None, None]
    values *= np.linspace(2, 0.5, S, dtype="float32")[:, None, None]
    cache = CacheSpec(2, S, 2, 64, layout=layout, codec=codec).allocate()
    cache, _ = cache.update(*map(jax.numpy.asarray, (keys, values)), 0)
    view = cache.view(cases.int32([S, 601]))
    masks = view_masks(view, cases.int32([[S + 2]]), sliding_window=S + 2 - 337)
    mask = np.arange(S) < np.reshape([S, 601], (2, 1, 1, 1))
    mask &= np.arange(S) > 337
    keys, values = map(getattr(reference_codecs, codec), (keys, values))
    expected = expect(query, keys, values, mask)
    check(attend(query, view, masks), expected)
    # Queries as narrow as an accelerator has them are multiplied so.
    narrow = attend(query.astype(jax.numpy.bfloat16), view, masks)
    check(narrow, expected, atol=0.02)


@pytest.mark.parametrize(
    "dtypes, atol",
    [
        (("bfloat16", "float32"), 1e-3),
        (("float32", "bfloat16"), 1e-5),
        (("float16", "float32"), 1e-4),
        (("float16", "float16"), 2e-3),
        (("float16", "bfloat16"), 1e-4),
    ],
)
def test_queries_and_slots_of_any_dtypes(dtypes, atol):
    """What they hold is exact; products are as narrow as both of them are."""
    query, keys, values = make_case(length=3)
    query = query.astype(jax.numpy.dtype(dtypes[0]))
    keys, values = (x.astype(jax.numpy.dtype(dtypes[1])) for x in (keys, values))
    mask = np.arange(S) < np.reshape([S, 601], (2, 1, 1, 1))
    view = make_view(keys, values)
    output = attend(query, view, cut(mask))
    query = np.float32((query * SCALE).astype(query.dtype)) / SCALE
    check(output, expect(query, np.float32(keys), np.float32(values), mask), atol)


def test_segments_of_unlike_forms():
    """Such as sinks kept exactly beside a ring of codes."""
    query, keys, values = make_case(sizes=(16, 16))
    exact = make_view(keys, values)
    cache = CacheSpec(2, S, 2, 16, codec="int8").allocate()
    cache, _ = cache.update(*map(jax.numpy.asarray, (keys, values)), 0)
    coded = cache.view(cases.int32([S, S])).segments
    segments = (exact.segments[0], *coded)
    seen = np.zeros((1, 1, 1, S), bool)
    seen[..., 100:] = True
    masks = [np.ones((1, 1, 1, 3), bool)]
    for segment in coded:
        positions = cases.numpy(segment.positions)[0]
        masks.append(seen[..., positions])
    output = attend(query, View(segments, 2, 16), masks)
    coded_keys, coded_values = map(reference_codecs.int8, (keys, values))
    keys[:, 3:], values[:, 3:] = coded_keys[:, 3:], coded_values[:, 3:]
    seen[..., :3] = True
    check(output, expect(query, keys, values, seen))


def test_more_parts_than_are_merged_at_a_time():
    """The last ones aren't full, some see nothing, and the heaviest isn't the first."""
    head_dim, value_dim, slots = 7, 251, 10_007
    query = cases.noise(1, 1, 1, head_dim)
    keys = cases.noise(1, 1, head_dim, slots, seed=1)
    values = cases.noise(1, 1, slots, value_dim, seed=2)
    keys[..., 9001:9007] += 3 * query.reshape(1, 1, head_dim, 1)
    mask = np.arange(slots).reshape(1, 1, 1, slots) > 3001
    tiling = choose_tiling(1, 1, slots, value_dim, "float32")
    assert tiling.parts > 32
    arrays = tuple(map(jax.numpy.asarray, (keys, values)))
    positions = jax.numpy.arange(slots)[None]
    segment = Segment(arrays, positions, HEAD_MAJOR, Exact(), head_dim, value_dim)
    arguments = (jax.numpy.asarray(query), [segment], [mask], 1, Scoring(1.0), None)
    output = attend_by_triton(*arguments, interpret=INTERPRET)
    scores = np.where(mask, query @ keys, -np.inf)
    weights = np.exp(scores - scores.max())
    check(output, weights / weights.sum() @ values)


def test_large_scores_and_nan():
    query, keys, values = make_case(sizes=(16, 16))
    mask = np.ones((1, 1, 1, S), bool)
    large = attend(query * 1000, make_view(keys * 100, values), cut(mask))
    check(large, expect(query * 1000, keys * 100, values, mask))
    query[0, 0, 1] = np.nan
    output = attend(query, make_view(keys, values), cut(mask))
    assert np.isnan(output[0, 0, 1]).all()
    query[0, 0, 1] = 0
    expected = expect(query, keys, values, mask)
    output[0, 0, 1] = expected[0, 0, 1]
    check(output, expected)


@pytest.mark.parametrize("length", [1, 43])
def test_it_counts_in_32_bits(length):
    """Where JAX computes in 64 bits, too."""
    query, keys, values = make_case(length=length)
    mask = np.random.default_rng(3).random((2, 6, length, S)) < 0.3
    jax.config.update("jax_enable_x64", True)
    try:
        output = attend(query, make_view(keys, values), cut(mask))
    finally:
        jax.config.update("jax_enable_x64", False)
    check(output, expect(query, keys, values, mask))


@pytest.mark.parametrize(
    "heads, slots", [(8, 8192), (8, 257), (256, 8192), (5000, 300)]
)
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


def test_gpus_of_nvidia_have_triton(fake_gpu, monkeypatch):
    assert platform.has_triton()
    fake_gpu.compute_capability = "7.5"
    assert not platform.has_triton()
    fake_gpu.compute_capability = "12.0"
    assert platform.has_triton()
    monkeypatch.setattr(keras.distribution, "distribution", lambda: "spread")
    assert not platform.has_triton()
    monkeypatch.undo()
    assert platform.has_triton() == (not INTERPRET)


def test_gpus_of_others_have_none(fake_gpu):
    fake_gpu.client.platform_version = "PJRT C API\nrocm 60443484"
    fake_gpu.compute_capability = "gfx942"
    assert not platform.has_triton()


@pytest.mark.usefixtures("on_gpu")
def test_it_is_used_where_there_is_triton(monkeypatch):
    query, keys, values = make_case()
    segments = make_view(keys, values).segments
    for rows in (1, 3, 2048):
        grouped = jax.numpy.zeros((2, 2, rows, 7))
        assert suits_kernel(grouped, segments, (None,) * 3, Scoring(SCALE))
    large = [replace(segment, value_dim=257) for segment in segments]
    assert not suits_kernel(grouped, large, (None,) * 3, Scoring(SCALE))
    without = [replace(segment, codec=AsGiven()) for segment in segments]
    assert not suits_kernel(grouped, without, (None,) * 3, Scoring(SCALE))
    monkeypatch.setattr(keras.distribution, "distribution", lambda: "spread")
    assert not suits_kernel(grouped, segments, (None,) * 3, Scoring(SCALE))


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize(
    "codec, layout", cases.stored(["float32", "float16", "int8", "int4"])
)
def test_what_it_reads_is_one_segment(codec, layout):
    cache = CacheSpec(1, 2048, 2, 64, layout=layout, codec=codec).allocate()
    is_one = len(cache.view(cases.int32([7])).segments) == 1
    assert is_one == (codec != "int4")


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
