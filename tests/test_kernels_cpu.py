"""The kernel for few queries on a CPU: its numbers, and where it has a part."""

import concurrent.futures
from dataclasses import replace

import attention_cases as cases
import jax
import numpy as np
import pytest
import reference_codecs
from conftest import make_lm
from kernel_cases import (
    SCALE,
    S,
    cut,
    expect,
    make_case,
    make_spoilt_case,
    make_view,
)

from keras_kvcache.attention import (
    Scoring,
    Segment,
    attend,
    attend_with_scores,
    view_masks,
)
from keras_kvcache.attention.codecs import AsGiven, Exact
from keras_kvcache.attention.kernels.decode_attention import NAME, suits_kernel
from keras_kvcache.attention.segments import HEAD_MAJOR
from keras_kvcache.caches import CacheSpec
from keras_kvcache.caches.trees import as_bits
from keras_kvcache.runtime import native

pytestmark = [
    pytest.mark.jax_only,
    pytest.mark.skipif(
        native.find_compiler() is None, reason="the kernel needs a C++ compiler"
    ),
]

LAYOUTS = pytest.mark.parametrize("layout", ["head_major", "dense"])


def check(got, expected):
    np.testing.assert_allclose(cases.numpy(got), expected, rtol=0, atol=1e-5)


def uses_kernel(function, *arguments):
    """Whether a function's compiled program calls the kernel."""
    return NAME in jax.jit(function).lower(*arguments).compile().as_text()


# Four queries of a head go through the kernel at once, and lanes of 4, 8 or 16.
@pytest.mark.parametrize(
    "layout, sizes",
    [
        *(("head_major", sizes) for sizes in [(7, 11), (64, 64), (5, 83), (131, 3)]),
        *(("dense", (size, size)) for size in (3, 7, 64, 131)),
    ],
)
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1), (5, 1), (14, 2)])
def test_equals_attention_in_numpy(heads, layout, sizes):
    query, keys, values = make_case(heads=heads, sizes=sizes)
    mask = np.arange(S) < np.reshape([S, 601], (2, 1, 1, 1))
    view, masks = make_view(keys, values, layout), cut(mask)
    assert uses_kernel(lambda query: attend(query, view, masks, Scoring(SCALE)), query)
    check(attend(query, view, masks, Scoring(SCALE)), expect(query, keys, values, mask))


@pytest.mark.parametrize(
    "codec, layout, sizes",
    [
        *(("bfloat16", "dense", (size, size)) for size in (7, 64)),
        *(
            (codec, "head_major", sizes)
            for codec in ("bfloat16", "int8")
            for sizes in [(7, 11), (64, 64), (131, 3)]
        ),
    ],
)
@pytest.mark.parametrize("heads", [(6, 2), (5, 1)])
@pytest.mark.parametrize("soft_cap", [None, 1.5])
def test_narrow_slots_are_what_they_stand_for(codec, layout, sizes, heads, soft_cap):
    query, keys, values = make_case(heads=heads, sizes=sizes)
    # Scales that differ from slot to slot.
    keys *= np.linspace(0.5, 2, S, dtype="float32")[:, None, None]
    values *= np.linspace(2, 0.5, S, dtype="float32")[:, None, None]
    cache = CacheSpec(2, S, heads[1], *sizes, layout=layout, codec=codec).allocate()
    cache, _ = cache.update(*map(jax.numpy.asarray, (keys, values)), 0)
    # A window that begins and ends within pieces.
    fill = np.reshape([S, 601], (2, 1, 1, 1))
    mask = (np.arange(S) < fill) & (np.arange(S) > 337)
    view = cache.view(cases.int32([S, 601]))
    masks = view_masks(view, cases.int32([[S + 2]]), sliding_window=S + 2 - 337)
    assert uses_kernel(lambda query: attend(query, view, masks, Scoring(SCALE)), query)
    output = attend(query, view, masks, Scoring(SCALE, soft_cap))
    keys, values = map(getattr(reference_codecs, codec), (keys, values))
    check(output, expect(query, keys, values, mask, soft_cap))


@pytest.mark.parametrize("soft_cap", [None, 1.5])
@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
@LAYOUTS
def test_masks_of_all_shapes(layout, per_token, per_head, per_row, length, soft_cap):
    query, keys, values = make_case(batch=3, length=length, sizes=(11, 11))
    axes = (3 if per_row else 1, 6 if per_head else 1, length if per_token else 1)
    mask = np.random.default_rng(3).random((*axes, S)) < 0.3
    mask[..., :5] = mask[..., 700:] = False  # a whole segment, and most of another
    view = make_view(keys, values, layout)
    output = attend(query, view, cut(mask), Scoring(SCALE, soft_cap))
    check(output, expect(query, keys, values, mask, soft_cap))


@LAYOUTS
def test_no_mask(layout):
    query, keys, values = make_case(sizes=(11, 11))
    output = attend(query, make_view(keys, values, layout), (None,) * 3, Scoring(SCALE))
    check(output, expect(query, keys, values, True))


@LAYOUTS
def test_a_query_with_nothing_to_attend_gives_zeros(layout):
    query, keys, values = make_case(batch=3, sizes=(11, 11))
    mask = np.ones((3, 1, 1, S), bool)
    mask[1] = False
    output = attend(query, make_view(keys, values, layout), cut(mask), Scoring(SCALE))
    check(output, expect(query, keys, values, mask))
    assert not cases.numpy(output)[1].any()


@LAYOUTS
def test_slots_outside_of_what_is_attended_are_not_read(layout):
    query, keys, values = make_case(sizes=(11, 11))
    mask = (np.arange(S) >= 37) & (np.arange(S) < 1013)
    expected = expect(query, keys, values, mask)
    keys[:, ~mask] = values[:, ~mask] = np.nan
    view = make_view(keys, values, layout)
    check(attend(query, view, cut(mask[None, None, None]), Scoring(SCALE)), expected)


@pytest.mark.parametrize("soft_cap", [None, 1.5])
@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("length", [1, pytest.param(3, marks=pytest.mark.slow), 29])
@LAYOUTS
def test_what_is_hidden_never_counts(layout, length, kernel, soft_cap, request):
    """Whatever it holds, be it hidden from all queries or from all but one."""
    if not kernel:
        request.getfixturevalue("without_compiler")
    query, keys, values, mask, expected = make_spoilt_case(length, soft_cap)
    view = make_view(keys, values, layout)
    check(attend(query, view, cut(mask), Scoring(SCALE, soft_cap)), expected)
    beside, _ = attend_with_scores(query, view, cut(mask), Scoring(SCALE, soft_cap))
    check(beside, expected)


def test_layouts_side_by_side():
    """No cache is so, but each segment is told by itself how it lies."""
    query, keys, values = make_case(sizes=(11, 11))
    mask = np.arange(S) < np.reshape([S, 601], (2, 1, 1, 1))
    first, *others = make_view(keys, values).segments
    view = make_view(keys, values, "dense")
    for segments in [(first, *view.segments[1:]), (view.segments[0], *others)]:
        mixed = view._replace(segments=segments)
        output = attend(query, mixed, cut(mask), Scoring(SCALE))
        check(output, expect(query, keys, values, mask))


def test_large_scores_do_not_overflow():
    query, keys, values = make_case()
    query[:] = keys[:] = 0
    query[..., 0] = 1 / SCALE
    keys[:, 3, :, 0], keys[:, 1090, :, 0] = 1e5, 3e5
    output = attend(query, make_view(keys, values), (None,) * 3, Scoring(SCALE))
    expected = np.repeat(values[:, 1090:1091], 3, axis=2)
    np.testing.assert_array_equal(cases.numpy(output), expected)


@pytest.mark.parametrize("where", ["query", "keys"])
@LAYOUTS
def test_nan_stays_nan(layout, where):
    query, keys, values = make_case(sizes=(11, 11))
    mask = np.ones((1, 1, 1, S), bool)
    if where == "query":
        query[0] = np.nan
    else:  # a whole piece, of which nothing else could be left
        keys[0, 3:515] = np.nan
    output = attend(query, make_view(keys, values, layout), cut(mask), Scoring(SCALE))
    assert np.isnan(output[0]).all() and not np.isnan(output[1]).any()
    mask[..., 3:515] = False  # What is hidden does no harm.
    if where == "keys":
        output = attend(
            query, make_view(keys, values, layout), cut(mask), Scoring(SCALE)
        )
        check(output, expect(query, np.nan_to_num(keys), values, mask))


def test_any_byte_but_zero_is_true():
    """As JAX has it, which takes NumPy's booleans as they are."""
    query, keys, values = make_case()
    mask = np.full((1, 1, 1, S), 255, "uint8").view(bool)
    output = attend(query, make_view(keys, values), cut(mask), Scoring(SCALE))
    check(output, expect(query, keys, values, True))


def test_calls_at_once_do_not_meet():
    """Threads share the pool; late helpers find work done and forgotten."""
    query, keys, values = make_case()
    view, masks = make_view(keys, values), (None,) * 3
    queries = [query * (1 + number / 7) for number in range(7)]
    run = jax.jit(lambda query: attend(query, view, masks, Scoring(SCALE)))
    expected = [cases.numpy(run(query)) for query in queries]
    with concurrent.futures.ThreadPoolExecutor(5) as pool:
        for got, wanted in zip(pool.map(run, queries * 40), expected * 40, strict=True):
            np.testing.assert_array_equal(cases.numpy(got), wanted)


def plain(view):
    """A view that kernels don't read."""
    segments = (replace(segment, codec=AsGiven()) for segment in view.segments)
    return view._replace(segments=tuple(segments))


@LAYOUTS
def test_gradients(layout):
    """By what stands in for the kernel: masks a token and the soft cap included."""
    query, keys, values = make_case(length=5, sizes=(11, 11))
    masks = cut(np.random.default_rng(3).random((1, 1, 5, S)) < 0.3)

    def loss(query, keys, values, arrays):
        view = make_view(keys, values, layout)
        view = view if arrays else plain(view)
        return (attend(query, view, masks, Scoring(SCALE, 1.5)) ** 2).sum()

    gradient = jax.grad(loss, argnums=(0, 1, 2))
    with_kernel = gradient(query, keys, values, True)
    without = gradient(query, keys, values, False)
    assert all(np.abs(part).max() > 1e-3 for part in without)
    for got, expected in zip(with_kernel, without, strict=True):
        check(got, cases.numpy(expected))


@LAYOUTS
def test_vmap(layout):
    query, keys, values = make_case(sizes=(11, 11))
    queries = np.stack([query, -query, 2 * query])
    view = make_view(keys, values, layout)
    run = jax.vmap(lambda query: attend(query, view, (None,) * 3, Scoring(SCALE, 1.5)))
    for got, query in zip(run(queries), queries, strict=True):
        check(got, expect(query, keys, values, True, soft_cap=1.5))


@LAYOUTS
def test_vmap_over_caches(layout):
    query, keys, values = make_case(sizes=(11, 11))

    @jax.vmap
    def run(keys, values):
        return attend(
            query, make_view(keys, values, layout), (None,) * 3, Scoring(SCALE)
        )

    for got, sign in zip(run(*map(both_signs, (keys, values))), (1, -1), strict=True):
        check(got, expect(query, sign * keys, sign * values, True))


def both_signs(array):
    return jax.numpy.stack([array, -array])


@LAYOUTS
def test_where_jax_runs_operation_by_operation(layout):
    query, keys, values = make_case(sizes=(11, 11))
    view = make_view(keys, values, layout)

    def run(query):
        return attend(query, view, (None,) * 3, Scoring(SCALE))

    expected = expect(query, keys, values, True)
    check(jax.checkpoint(run)(query), expected)
    with jax.disable_jit():
        check(run(query), expected)


def test_queries_of_other_dtypes():
    query, keys, values = make_case()
    view = make_view(keys, values)
    for dtype in ("bfloat16", "float16"):
        narrow = jax.numpy.asarray(query, dtype)
        assert uses_kernel(lambda q: attend(q, view, (None,) * 3, Scoring(0.5)), narrow)
        output = attend(narrow, view, (None,) * 3, Scoring(1.0))
        assert output.dtype == "float32"
        exact = cases.numpy(narrow.astype("float32")) / SCALE
        check(output, expect(exact, keys, values, True))


def test_other_platforms_and_several_devices_do_without_it(monkeypatch):
    query, keys, values = make_case()
    view = make_view(keys, values)
    run = jax.jit(lambda query: attend(query, view, (None,) * 3, Scoring(SCALE)))
    assert f"@{NAME}(" in run.trace(query).lower().as_text()
    for_tpu = run.trace(query).lower(lowering_platforms=("tpu",)).as_text()
    assert f"@{NAME}(" not in for_tpu
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    grouped = jax.numpy.zeros((2, 2, 3, 7))
    assert not suits_kernel(grouped, view.segments, (), Scoring(1))
    monkeypatch.undo()
    assert suits_kernel(grouped, view.segments, (), Scoring(1))


def wrong_arguments():
    query, keys, values = make_case()
    other = make_case(batch=3, sizes=(13, 11))
    yield "segments", (other[0][:2], make_view(keys, values), (None,) * 3)
    yield "segments", (query[:1], make_view(keys, values), (None,) * 3)
    yield "masks", (query, make_view(keys, values), cut(np.ones((3, 1, 1, S), bool)))
    yield "masks", (query, make_view(keys, values), cut(np.ones((1, 1, 5, S), bool)))
    narrow = make_view(keys, values)
    segment = narrow.segments[0]
    arrays = (segment.arrays[0], segment.arrays[1].astype("bfloat16"))
    segments = (replace(segment, arrays=arrays), *narrow.segments[1:])
    yield "segments", (query, narrow._replace(segments=segments), (None,) * 3)
    query, keys, values = make_case(sizes=(7, 7))
    dense = make_view(keys, values, "dense")
    changes = [
        *({"array_offset": segment.array_offset + 1} for segment in dense.segments[2:]),
        {"array_offset": -1},
        {"head_dim": 11},
        {"layout": HEAD_MAJOR},
        {"codec": Exact("bfloat16")},
        *({"arrays": (array,)} for array in wrong_tensors(*dense.segments[2].arrays)),
        {"arrays": (dense.segments[2].arrays[0].astype("int8"),)},
        {"arrays": dense.segments[2].arrays * 2},
    ]
    for change in changes:
        segments = (*dense.segments[:2], replace(dense.segments[2], **change))
        yield "segments", (query, dense._replace(segments=segments), (None,) * 3)


def wrong_tensors(tensor):
    """One for each axis, as long as what's left after a step."""
    for axis in range(tensor.ndim):
        yield jax.lax.slice_in_dim(tensor, 1, tensor.shape[axis], axis=axis)
    yield tensor.astype("float16")


@pytest.mark.parametrize("number", range(18))
def test_what_does_not_fit_is_refused(number):
    name, arguments = list(wrong_arguments())[number]
    with pytest.raises(ValueError, match=f"`{name}` must .* Received"):
        attend(*arguments, Scoring(SCALE))


def test_a_mask_of_numbers():
    query, keys, values = make_case()
    mask = np.arange(S) % 3 == 1
    masks = cut(np.float32(mask[None, None, None]))
    output = attend(query, make_view(keys, values), masks, Scoring(SCALE))
    check(output, expect(query, keys, values, mask))


def step_of(layer):
    def step(x, cache, index):
        return layer(x, x, cache=cache, cache_update_index=index, use_causal_mask=True)

    return step


@pytest.mark.parametrize(
    "layout, dtype, length, expected",
    [
        ("head_major", "float32", 1, True),
        ("head_major", "float32", 5, True),
        ("head_major", "float32", 65, False),  # bound by computing
        ("head_major", "bfloat16", 1, True),
        ("head_major", "float16", 1, False),
        ("dense", "float32", 1, True),
        ("dense", "bfloat16", 1, True),
        ("dense", "float16", 1, False),
        ("dense", "float32", 65, False),
    ],
)
def test_which_programs_call_it(layout, dtype, length, expected):
    layer = cases.make_layer(num_heads=2)
    cache = cases.make_cache(layer, 1, 103, layout, dtype)
    x = cases.noise(1, length, cases.D)
    assert uses_kernel(step_of(layer), x, cache, cases.int32(5)) == expected


def test_keys_and_values_of_different_sizes_have_no_kernel_if_dense():
    """They have two tensors, which it doesn't know."""
    cache = CacheSpec(2, 103, 2, 7, 11, layout="dense").allocate()
    query, view = cases.noise(2, 1, 6, 7), cache.view()
    assert not uses_kernel(lambda q: attend(q, view, (None,), Scoring(SCALE)), query)


@LAYOUTS
def test_an_exported_program_calls_nothing_of_ours(layout):
    layer = cases.make_layer(num_heads=2)
    cache = cases.make_cache(layer, 1, 103, layout, filler=0.5)
    step = jax.jit(step_of(layer))
    arguments = (cases.noise(1, 1, cases.D), cache, cases.int32(5))
    output, _ = step(*arguments)
    leaves, tree = jax.tree_util.tree_flatten(arguments)

    @jax.jit
    def of_leaves(*leaves):
        return step(*jax.tree_util.tree_unflatten(tree, leaves))[0]

    assert f"@{NAME}(" in of_leaves.lower(*leaves).as_text()
    exported = jax.export.export(of_leaves)(*leaves)
    assert f"@{NAME}(" not in exported.mlir_module()
    check(exported.call(*leaves), cases.numpy(output))


def test_tokens_are_the_same_without_it(without_compiler, monkeypatch):
    lowered = []
    call = jax.ffi.ffi_call
    monkeypatch.setattr(
        jax.ffi, "ffi_call", lambda *args: lowered.append(args) or call(*args)
    )
    prompts = [[1, 2, 3, 5, 8], [13]]
    by_xla = make_lm().generate(prompts, max_new_tokens=29)
    assert not lowered
    without_compiler()
    assert make_lm().generate(prompts, max_new_tokens=29) == by_xla
    assert lowered


@pytest.mark.parametrize("bits", [False, True])
@pytest.mark.parametrize("codec, layout", cases.stored(["bfloat16", "int8"]))
def test_narrow_slots_without_it(layout, codec, bits):
    """An export has the stand-in, which is told from the dtype how slots are coded."""
    cache = CacheSpec(2, 1031, 2, 7, layout=layout, codec=codec).allocate()
    cache = as_bits(cache) if bits else cache
    entries = cases.noise(2, 1031, 2, 7)
    cache, _ = cache.update(*map(jax.numpy.asarray, (entries, -entries)), 0)
    leaves, tree = jax.tree_util.tree_flatten(cache)

    @jax.jit
    def run(query, *leaves):
        view = jax.tree_util.tree_unflatten(tree, leaves).view()
        return attend(query, view, (None,) * len(view.segments), Scoring(SCALE))

    query = cases.noise(2, 1, 6, 7, seed=1)
    output = run(query, *leaves)
    assert np.abs(output).max() > 0.1
    check(jax.export.export(run)(query, *leaves).call(query, *leaves), output)


def test_symbolic_sizes_have_no_kernel():
    def uses(keys):
        values = jax.numpy.swapaxes(keys, 2, 3)
        segment = Segment((keys, values), None, HEAD_MAJOR, Exact(), 7, 7)
        query = keys[:, :, :1, :7]
        return jax.numpy.asarray(suits_kernel(query, (segment,), (), Scoring(1)))

    shape = jax.export.symbolic_shape("b, 2, 7, n")
    known = jax.ShapeDtypeStruct((3, 2, 7, 11), "float32")
    unknown = jax.ShapeDtypeStruct(shape, "float32")
    exported = [jax.export.export(jax.jit(uses))(size) for size in (known, unknown)]
    zeros = np.zeros((3, 2, 7, 11), "float32")
    assert [bool(program.call(zeros)) for program in exported] == [True, False]
