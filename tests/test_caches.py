"""Caches: sizes, layouts, immutability, what a call sees, what JAX makes of them."""

import dataclasses
import itertools

import attention_cases as cases
import jax
import keras
import numpy as np
import pytest
import reference_cache
import reference_codecs

from keras_kvcache.attention import Scoring, attend, token_positions, view_masks
from keras_kvcache.attention.products import mix, scores_of
from keras_kvcache.caches import (
    Cache,
    CacheSpec,
    Exact,
    Int4,
    Rolling,
    Static,
    StaticCache,
    get_codec,
)
from keras_kvcache.caches.segmentation import ring_slots, segment_sizes, whole_groups

B, K, H = 3, 2, 7
CAPACITIES = (1, 256, 257, 1033)
DTYPES = ("float32", "bfloat16", "float16")
KINDS = {"static": "static", "rolling": Rolling(13), "sinks": Rolling(13, sinks=3)}
CODECS = ("float32", "bfloat16", "int8", "int4")
COMBINATIONS = [(kind, *pair) for kind in KINDS for pair in cases.stored(CODECS)]
every_combination = pytest.mark.parametrize("kind, codec, layout", COMBINATIONS)


def make_spec(kind, codec, layout, capacity=41, **sizes):
    sizes = dict(batch_size=B, num_key_value_heads=K, head_dim=H, **sizes)
    return CacheSpec(
        capacity=capacity, codec=codec, layout=layout, kind=KINDS[kind], **sizes
    )


def leaves(cache):
    return [cases.numpy(leaf) for leaf in jax.tree_util.tree_leaves(cache)]


def make_entries(length, seed=0):
    return cases.noise(2, B, length, K, H, seed=seed)


@cases.compiled
def update(cache, entries, index):
    return cache.update(*entries, index)[0]


@cases.compiled
def step(cache, query, entries, index):
    """Output and the new cache, as the layer computes them."""
    cache, view = cache.update(*entries, index)
    masks = view_masks(view, token_positions(index, query.shape[1]), causal=True)
    return attend(query, view, masks, Scoring(1.0)), cache


# Sizes.


@pytest.mark.parametrize(
    "capacity, sizes",
    [
        (1, (1,)),
        (256, (256,)),
        (257, (256, 1)),
        (1021, (256, 765)),
        (1033, (256, 768, 9)),
        (4096, (256, 768, 1024, 2048)),
        (4099, (256, 768, 1024, 2048, 3)),
    ],
)
def test_segments(capacity, sizes):
    assert segment_sizes(capacity, kernels_read=True) == sizes


@pytest.mark.parametrize("group", [1, 5, 32])
def test_a_group_that_begins_replaces_what_no_query_sees(group):
    """With the fewest slots of which that is true."""
    for window in range(1, 99):
        slots = ring_slots(window, group)
        assert slots == whole_groups(slots, group)

        def replaces_what_is_seen(slots, window=window):
            # The first token of a group at `slots` sees so far back.
            return slots - window + 1 < group

        assert not replaces_what_is_seen(slots)
        assert slots == group or replaces_what_is_seen(slots - group)


def bytes_of(array):
    """What one of the backend's arrays takes."""
    if keras.backend.backend() == "jax":
        return array.nbytes
    dtype = keras.backend.standardize_dtype(array.dtype)
    size = {"bfloat16": 2, "float16": 2, "int16": 2, "int8": 1, "uint8": 1}.get(
        dtype, 4
    )
    return size * int(np.prod(array.shape))


@every_combination
@pytest.mark.parametrize("value_dim", [None, 5])
def test_size_is_what_is_allocated(kind, codec, layout, value_dim):
    spec = make_spec(kind, codec, layout, value_dim=value_dim)
    cache = spec.allocate()
    arrays = jax.tree_util.tree_leaves(cache)
    allocated = sum(bytes_of(array) for array in arrays)
    assert cache.nbytes == spec.nbytes == allocated == B * spec.bytes_per_row
    assert all(array.shape[0] == B for array in arrays)
    slots = spec.bytes_per_token * cache.storage.slots
    if kind == "static" and codec != "int4":
        assert cache.capacity == 41 and spec.nbytes == B * slots
    # Positions, the newest group and the sinks.
    assert B * slots <= spec.nbytes
    for array in leaves(dataclasses.replace(cache, end=None)):
        assert not array.any()


@pytest.mark.parametrize("codec, bytes_per_number", [("int8", 1), ("int4", 0.5)])
def test_codes_take_few_bytes(codec, bytes_per_number):
    """At head sizes of models, scales and the newest group cost little."""
    spec = CacheSpec(1, 4096, 8, 64, codec=codec)
    exact = CacheSpec(1, 4096, 8, 64, codec="bfloat16")
    assert spec.nbytes <= (bytes_per_number / 2 + 0.05) * exact.nbytes
    if codec == "int4":
        assert spec.nbytes <= 0.30 * exact.nbytes


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_values_may_have_another_size(layout):
    cache = make_spec("static", "float32", layout, value_dim=5).allocate()
    assert cache.nbytes == 4 * B * 41 * K * (H + 5)
    with pytest.raises(ValueError, match="key_dim=7, value_dim=5"):
        cache.to_dense()
    key, value = cases.noise(B, 11, K, H), cases.noise(B, 11, K, 5, seed=1)
    keys, values = update(cache, (key, value), cases.int32(30)).storage.decode()
    np.testing.assert_array_equal(cases.numpy(keys)[:, 30:], key)
    np.testing.assert_array_equal(cases.numpy(values)[:, 30:], value)


@pytest.mark.parametrize(
    "changed, words",
    [
        (dict(batch_size=0), ["`batch_size`", "0"]),
        (dict(capacity=-1), ["`capacity`", "-1"]),
        (dict(capacity=1.5), ["`capacity`", "1.5"]),
        (dict(capacity=True), ["`capacity`", "True"]),
        (dict(num_key_value_heads=None), ["`num_key_value_heads`", "None"]),
        (dict(head_dim="7"), ["`head_dim`", "'7'"]),
        (dict(value_dim=0), ["`value_dim`", "0"]),
        (dict(codec="int7"), ["`codec`", "'int7'", "bfloat16", "int8", "int4"]),
        (dict(codec="float8"), ["`codec`", "'float8'", "float32"]),
        (dict(codec=8), ["`codec`", "8"]),
        (dict(layout="sparse"), ["`layout`", "'sparse'", "dense", "head_major"]),
        (dict(layout="dense", codec="int8"), ["`layout`", "head_major", "'int8'"]),
        (dict(layout="dense", codec="int4"), ["`layout`", "head_major", "'int4'"]),
        (dict(layout="dense", codec=get_codec("int4").residual_codec), ["`layout`"]),
        (dict(kind="ring"), ["`kind`", "'ring'", "static", "Rolling"]),
        (dict(kind="rolling"), ["`kind`", "'rolling'", "Rolling(window"]),
        (dict(kind=None), ["`kind`", "None"]),
    ],
    ids=str,
)
def test_bad_specs(changed, words):
    good = dict(batch_size=B, capacity=5, num_key_value_heads=K, head_dim=H)
    with pytest.raises(ValueError) as caught:
        CacheSpec(**{**good, **changed})
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(window=0), ["`window`", "at least 1", "0"]),
        (dict(window=-3), ["`window`", "-3"]),
        (dict(window=2.0), ["`window`", "2.0"]),
        (dict(window=True), ["`window`", "True"]),
        (dict(window=5, sinks=-1), ["`sinks`", "at least 0", "-1"]),
        (dict(window=5, sinks=5), ["`sinks`", "smaller", "sinks=5", "window=5"]),
        (dict(window=5, sinks=7), ["`sinks`", "sinks=7", "window=5"]),
        (dict(window=1, sinks=None), ["`sinks`", "None"]),
    ],
    ids=str,
)
def test_bad_windows(arguments, words):
    with pytest.raises(ValueError) as caught:
        Rolling(**arguments)
    for word in words:
        assert word in str(caught.value)


def test_names_stand_for_objects():
    by_name, by_object = (
        CacheSpec(B, 5, K, H, codec=codec, kind=kind)
        for codec, kind in (("int4", "static"), (Int4(), Static()))
    )
    assert by_name == by_object


# Layouts.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("capacity", CAPACITIES)
def test_layouts_turn_into_each_other(capacity, dtype):
    """Not a bit is lost either way, and each entry is where it belongs."""
    tensor = keras.ops.convert_to_tensor(cases.noise(B, 2, capacity, K, H), dtype=dtype)
    cache = StaticCache.from_dense(tensor)
    assert [keys.shape[3] for keys, _ in cache.storage.segments] == list(
        segment_sizes(capacity, kernels_read=True)
    )
    np.testing.assert_array_equal(cases.entries(cache), cases.numpy(tensor))
    back = cache.to_dense()
    assert keras.backend.standardize_dtype(back.dtype) == dtype
    np.testing.assert_array_equal(cases.numpy(back), cases.numpy(tensor))
    assert StaticCache.from_dense(tensor, "dense").to_dense() is tensor


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_a_dense_tensor_of_coded_entries(codec):
    cache = make_spec("static", codec, "head_major").allocate()
    cache = update(cache, make_entries(37), cases.int32(0))
    full = 32 if codec == "int4" else 37
    keys, values = (cases.numpy(x)[:, :full] for x in cache.storage.decode())
    dense = cases.entries(cache)[:, :, :full]
    np.testing.assert_array_equal(dense, np.stack([keys, values], axis=1))


# What a call sees.


@cases.compiled
def positions_after(cache, entries, index):
    """The positions of row 0 that the view of an update shows, and the new cache."""
    cache, view = cache.update(*entries, index)
    positions = [segment.positions[0] for segment in view.segments]
    return keras.ops.concatenate(positions), cache


@pytest.mark.parametrize("codec, layout", cases.stored(["float32", "int4"]))
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_in_sight_is_seen_once(kind, codec, layout):
    """By its position, wherever its slot is; what's elsewhere has no position there."""
    cache, fill = make_spec(kind, codec, layout).allocate(), 0
    rolling = KINDS[kind]
    for length in (17, 1, 17, 1, 1):
        index, fill = fill, fill + length
        entries = make_entries(length)
        positions, cache = positions_after(cache, entries, cases.int32(index))
        seen = [p for p in cases.numpy(positions).tolist() if 0 <= p < fill]
        in_sight = set(range(fill))
        if kind != "static":
            in_sight = set(range(max(index - rolling.window + 1, 0), fill))
            in_sight |= set(range(rolling.sinks))
        assert [seen.count(position) for position in in_sight] == [1] * len(in_sight)


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_view_of_all_slots(layout):
    cache = make_spec("static", "float32", layout, capacity=1033).allocate()
    entry = keras.ops.ones((B, 5, K, H))
    for index, fill in ((3, [8]), (cases.int32([0, 1, 1028]), [5, 6, 1033])):
        _, view = cache.update(entry, entry, index)
        assert cases.numpy(view.fill).tolist() == fill
        positions = [cases.numpy(s.positions)[0] for s in view.segments]
        np.testing.assert_array_equal(np.concatenate(positions), np.arange(1033))
        for segment, size in zip(view.segments, segment_sizes(1033, True), strict=True):
            scores = scores_of(segment, keras.ops.ones((B, K, 13, H)), 0, size)
            assert tuple(scores.shape) == (B, K, 13, size)
            assert tuple(mix(segment, scores, 0, size).shape) == (B, K, 13, H)
    assert cache.view().fill is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("causal", [True, False])
def test_layer_with_a_cache_is_the_layer_without(kind, layout, causal):
    """Given a mask of what a call of the other one could see."""
    layer, _ = cases.make_kind("grouped")
    x = cases.noise(B, 23, cases.D)
    spec = dict(kind=KINDS[kind], layout=layout)
    heads = layer.num_key_value_heads
    cache = CacheSpec(B, 29, heads, layer.key_dim, **spec).allocate()

    @cases.compiled
    def call(x, cache, index):
        return layer(
            x, x, cache=cache, cache_update_index=index, use_causal_mask=causal
        )

    outputs, mask = [], np.zeros((23, 23), bool)
    for first, last in ((0, 17), (17, 18), (18, 23)):
        output, cache = call(x[:, first:last], cache, cases.int32(first))
        outputs.append(cases.numpy(output))
        for query, slot in itertools.product(range(first, last), range(last)):
            is_near = kind == "static" or abs(query - slot) < 13
            is_sink = kind == "sinks" and slot < 3
            mask[query, slot] = (is_near or is_sink) and (slot <= query or not causal)
    expected = cases.compiled(lambda x, mask: layer(x, x, attention_mask=mask))(x, mask)
    np.testing.assert_allclose(
        np.concatenate(outputs, axis=1), cases.numpy(expected), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("codec", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_text_written_whole_is_read_whole(kind, codec):
    """By a call without an index, as a decoder reads its encoder's entries.

    All of what a cache was asked to take, that is; groups may need more slots.
    """
    length = 41 if kind == "static" else 13
    query, entries = cases.noise(B, 5, K, H), make_entries(length)
    outputs = []
    for _, layout in cases.stored([codec]):
        cache = make_spec(kind, codec, layout).allocate()
        cache = update(cache, entries, cases.int32(0))

        @cases.compiled
        def read(cache, query):
            view = cache.view()
            return attend(
                query, view, view_masks(view, token_positions(0, 5)), Scoring(1.0)
            )

        outputs.append(cases.numpy(read(cache, query)))
    reference = reference_cache.ReferenceCache(B, lambda x: x)
    for row in range(B):
        reference.write(row, 0, *entries[:, row])
        expected = reference.attend(row, query[row])
        tolerance = {"float32": 1e-5, "bfloat16": 0.02, "int8": 0.03}.get(codec, 0.4)
        for output in outputs:
            np.testing.assert_allclose(output[row], expected, rtol=0, atol=tolerance)


# Codecs.


def relative_error(codec, kind):
    """Of the attention of the next token, against exact entries."""
    query, outputs = cases.noise(B, 1, K, H, seed=5) / H**0.5, []
    for name in (codec, "float32"):
        cache = make_spec(kind, name, "head_major", capacity=101).allocate()
        for index in range(0, 99, 11):
            cache = update(cache, make_entries(11, seed=index), cases.int32(index))
        output, _ = step(cache, query, make_entries(1, seed=99), cases.int32(99))
        outputs.append(cases.numpy(output))
    difference = np.linalg.norm(outputs[0] - outputs[1])
    return difference / np.linalg.norm(outputs[1])


@pytest.mark.parametrize(
    "codec, largest", [("bfloat16", 0.005), ("int8", 0.01), ("int4", 0.2)]
)
@pytest.mark.parametrize("kind", ["static", "sinks"])
def test_codecs_change_attention_little(codec, largest, kind):
    assert 0 < relative_error(codec, kind) <= largest


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("codec", ["int8", "int4"])
@pytest.mark.parametrize("value", [0.0, 1.0, -3.7, 6.5e4])
def test_constants_survive(value, codec, dtype):
    """Keys as they were; of values int4 loses as much as of any others."""
    cache = CacheSpec(B, 64, K, H, codec=get_codec(codec, dtype)).allocate()
    entries = np.full((2, B, 37, K, H), value, dtype)
    value = float(entries[0, 0, 0, 0, 0])
    cache = update(cache, entries, cases.int32(0))
    keys, values = (cases.numpy(x)[:, :32] for x in cache.storage.decode())
    np.testing.assert_allclose(keys, value, rtol=0.01)
    if codec == "int8":
        np.testing.assert_allclose(values, value, rtol=0.01)
    norms = np.linalg.norm(values - value, axis=-1)
    assert (norms <= 0.17 * abs(value) * H**0.5).all()
    query = np.full((B, 1, K, H), 1e-4, "float32")
    output, _ = step(cache, query, entries[:, :, :1], cases.int32(37))
    norms = np.linalg.norm(cases.numpy(output) - value, axis=-1)
    assert (norms <= 0.17 * abs(value) * H**0.5).all()


@every_combination
def test_no_entries_change_nothing(kind, codec, layout):
    cache = make_spec(kind, codec, layout).allocate()
    cache = update(cache, make_entries(17), cases.int32(0))
    same = update(cache, make_entries(17)[:, :, :0], cases.int32(17))
    for before, after in zip(leaves(cache), leaves(same), strict=True):
        np.testing.assert_array_equal(after, before)


@pytest.mark.jax_only
def test_a_dtype_that_the_backend_lacks():
    """JAX would turn float64 into float32 without a word."""
    spec = CacheSpec(B, 5, K, H, codec=Exact("float64"))
    with pytest.raises(ValueError, match="float64, which becomes float32"):
        spec.allocate()


@pytest.mark.parametrize("kind", ["static", "rolling"])
def test_keys_are_exact_until_their_group_is_full(kind):
    """And within half a step of it from then on."""
    entries = make_entries(37)
    cache = make_spec(kind, "int4", "head_major").allocate()
    cache = update(cache, entries[:, :, :31], cases.int32(0))
    newest, _ = map(cases.numpy, cache.residual.storage.decode())
    np.testing.assert_array_equal(newest[:, :31], entries[0, :, :31])
    cache = update(cache, entries[:, :, 31:], cases.int32(31))
    assert cases.numpy(cache.residual.start).tolist() == [32] * B
    newest, _ = map(cases.numpy, cache.residual.storage.decode())
    np.testing.assert_array_equal(newest[:, :5], entries[0, :, 32:])
    coded, _ = map(cases.numpy, cache.storage.decode())
    group = np.float64(entries[0, :, :32])
    lowest = group.min(axis=1, keepdims=True)
    # bfloat16 rounds the step, and the lowest level, which lies below by 1/256.
    step = (group.max(axis=1, keepdims=True) - lowest + abs(lowest) / 128) / 15
    assert (abs(coded[:, :32] - group) <= step * (1 + 1 / 256) / 2).all()
    for row in range(B):
        expected = reference_codecs.int4_of_group(entries[0, row, :32])
        np.testing.assert_array_equal(coded[row, :32], expected)


def test_sinks_are_exact_whatever_the_codec():
    entries = make_entries(17)
    for codec in ("int8", "int4"):
        cache = make_spec("sinks", codec, "head_major").allocate()
        cache = update(cache, entries, cases.int32(0))
        for decoded, given in zip(cache.sinks.decode(), entries, strict=True):
            np.testing.assert_array_equal(cases.numpy(decoded), given[:, :3])


@pytest.mark.parametrize("codec, layout", cases.stored(CODECS))
@pytest.mark.parametrize("kind", ["rolling", "sinks"])
def test_what_left_the_window_is_gone(kind, codec, layout):
    """Entries of 1e30, and the same query sees what it'd see without them."""
    query, outputs = cases.noise(B, 1, K, H), []
    for huge in (0.0, cases.GARBAGE):
        cache = make_spec(kind, codec, layout).allocate()
        for index in range(0, 64, 16):
            entries = make_entries(16, seed=index)
            if index == 16:
                entries[:] = huge
            # No entry has its group with those, whose range they would widen.
            if index != 0 or kind == "sinks":
                cache = update(cache, entries, cases.int32(index))
        output, _ = step(cache, query, make_entries(1, seed=9), cases.int32(64))
        outputs.append(cases.numpy(output))
    np.testing.assert_array_equal(*outputs)
    assert abs(outputs[1]).max() < 9


@pytest.mark.parametrize("length", [1, 3])
def test_a_row_that_brings_nothing_stays_as_it_was(length):
    """Even one that was rolled back into a group that was full."""
    cache = make_spec("static", "int4", "head_major").allocate()
    cache = update(cache, make_entries(37), cases.int32(0))
    padding = np.full((2, B, length, K, H), cases.GARBAGE, "float32")
    idle = update(cache.with_end(cases.int32([19] * B)), padding, cases.int32(19))
    query, entry = cases.noise(B, 1, K, H), make_entries(1, seed=9)
    outputs = [
        cases.numpy(step(c.with_end(None), query, entry, cases.int32(19))[0])
        for c in (cache, idle)
    ]
    np.testing.assert_array_equal(*outputs)


# Immutable trees of arrays.


@every_combination
def test_immutable(kind, codec, layout):
    """Updating gives a new cache; the old one, and its arrays, stay."""
    cache = make_spec(kind, codec, layout).allocate()
    assert isinstance(cache, Cache)
    for field in dataclasses.fields(cache):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(cache, field.name, None)
    before = leaves(cache)
    updated = update(cache, make_entries(11), cases.int32(3))
    assert type(updated) is type(cache)
    changed = []
    for old, kept, new in zip(before, leaves(cache), leaves(updated), strict=True):
        np.testing.assert_array_equal(old, kept)
        assert old.shape == new.shape
        changed.append((old != new).any())
    assert any(changed)


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_entries_go_to_their_slots(layout):
    cache = make_spec("static", "float32", layout, capacity=263).allocate()
    entries = make_entries(11)
    updated, _ = cache.update(*map(keras.ops.convert_to_tensor, entries), 251)
    held = cases.entries(updated)
    np.testing.assert_array_equal(held[:, :, 251:262], np.moveaxis(entries, 0, 1))
    assert not held[:, :, :251].any() and not held[:, :, 262:].any()


@pytest.mark.jax_only
@every_combination
def test_a_loop_leaves_what_a_chunk_leaves(kind, codec, layout):
    """As a loop's state, donated to the program, through `jit` and `tree_util`."""
    cache = make_spec(kind, codec, layout).allocate()
    arrays, structure = jax.tree_util.tree_flatten(cache)
    assert type(jax.tree_util.tree_unflatten(structure, arrays)) is type(cache)
    entries = make_entries(11)

    def loop(cache, entries):
        def body(number, cache):
            entry = jax.lax.dynamic_slice_in_dim(entries, number, 1, axis=2)
            return cache.update(*entry, number)[0]

        return jax.lax.fori_loop(0, 11, body, cache)

    options = {"xla_backend_optimization_level": 0}
    looped = jax.jit(loop, donate_argnums=0, compiler_options=options)(cache, entries)
    assert all(array.is_deleted() for array in arrays)
    fresh = make_spec(kind, codec, layout).allocate()
    written = update(fresh, entries, cases.int32(0))
    assert jax.tree_util.tree_structure(looped) == structure
    for one_by_one, at_once in zip(leaves(looped), leaves(written), strict=True):
        np.testing.assert_array_equal(one_by_one, at_once)


def test_static_cache_of_any_segments():
    """Whoever grows a cache adds a segment of whatever size."""
    cache = CacheSpec(B, 19, K, H).allocate()
    arrays, first = [], 0
    for size in (5, 3, 11):
        keys, values = cache.storage.segments[0]
        arrays.append(
            (keys[..., first:][..., :size], values[:, :, first:][:, :, :size])
        )
        first += size
    storage = dataclasses.replace(cache.storage, segments=tuple(arrays))
    cache = dataclasses.replace(cache, storage=storage)
    layer = cases.make_layer(4, H, num_key_value_heads=K)
    x = cases.noise(B, 13, cases.D)

    @cases.compiled
    def step(cache):
        call = dict(cache_update_index=4, use_causal_mask=True)
        return layer(x, x, cache=cache, **call)[0]

    output, dense = step(cache), step(cache.to_dense())
    np.testing.assert_allclose(
        cases.numpy(output), cases.numpy(dense), rtol=0, atol=1e-5
    )
