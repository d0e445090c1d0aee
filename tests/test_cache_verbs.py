"""Verbs of batches, on every kind of cache: rows that come and go, slots more or fewer.

What a verb does to rows is checked on all arrays of a cache, whatever they hold; what
it does to slots, by the entries that they decode to and by what a query sees then.
"""

import functools

import attention_cases as cases
import jax
import keras
import numpy as np
import pytest
import reference_cache
import reference_codecs

from keras_kvcache.attention import Scoring, attend, token_positions, view_masks
from keras_kvcache.caches import (
    CacheSpec,
    Rolling,
    batch_size,
    crop,
    insert_rows,
    join_rows,
    repeat_rows,
    reset_rows,
    resize,
    resize_window,
    split_rows,
    take_rows,
    with_end,
)

B, S, K, H = 5, 41, 2, 7
KINDS = {"static": "static", "rolling": Rolling(13), "sinks": Rolling(13, sinks=3)}
CODECS = ("float32", "bfloat16", "int8", "int4")
COMBINATIONS = [(kind, *pair) for kind in KINDS for pair in cases.stored(CODECS)]
every_combination = pytest.mark.parametrize("kind, codec, layout", COMBINATIONS)
TURN = reference_codecs.rotation(H)
# Codecs without and with groups, as `ReferenceCache` knows them.
RULES = {
    "float32": dict(code=lambda x: x),
    "int4": dict(code=lambda x: reference_codecs.int4(x @ TURN) @ TURN.T, group=32),
}


@functools.cache
def make_spec(kind, codec, layout, rows=B, capacity=S):
    heads = dict(num_key_value_heads=K, head_dim=H)
    kind = KINDS.get(kind, kind)
    return CacheSpec(rows, capacity, codec=codec, layout=layout, kind=kind, **heads)


def make_cache(*combination, seed=0, **sizes):
    """A cache whose arrays are full of whatever they can hold."""
    random = np.random.default_rng(seed)

    def fill(array):
        dtype = keras.backend.standardize_dtype(array.dtype)
        values = random.normal(size=array.shape)
        if dtype == "int16":  # bits of bfloat16
            values = keras.ops.convert_to_tensor(values, "bfloat16")
            return keras.ops.view(values, dtype)
        if "int" in dtype:
            values = random.integers(0, 100, array.shape)
        return keras.ops.convert_to_tensor(values, dtype)

    return jax.tree_util.tree_map(fill, make_spec(*combination, **sizes).allocate())


def leaves(tree):
    return [cases.numpy(leaf) for leaf in jax.tree_util.tree_leaves(tree)]


def assert_rows(tree, *caches, rows):
    """`tree` has these rows, `(number of the cache, row)`, of some caches."""
    arrays = [leaves(cache) for cache in caches]
    for number, got in enumerate(leaves(tree)):
        expected = np.stack([arrays[which][number][row] for which, row in rows])
        np.testing.assert_array_equal(got, expected)


# Rows.

take = cases.compiled(take_rows)
insert = cases.compiled(insert_rows)
reset = cases.compiled(reset_rows)
repeat = cases.compiled(lambda cache: repeat_rows(cache, 3))
split = cases.compiled(lambda cache: split_rows(cache, [1, 3, 1]))
join = cases.compiled(lambda *caches: join_rows(caches))


@every_combination
def test_rows_taken(kind, codec, layout):
    cache = make_cache(kind, codec, layout)
    for rows in ([4, 0, 0], [2, 3, 1]):
        taken = take(cache, cases.int32(rows))
        assert batch_size(taken) == 3
        assert_rows(taken, cache, rows=[(0, row) for row in rows])


def test_rows_that_only_the_running_program_knows():
    """There's no error to raise there: the nearest that is there is taken."""
    cache = make_cache("static", "float32", "dense")
    taken = take(cache, cases.int32([-1, 5, 2**31 - 1, 3]))
    assert_rows(taken, cache, rows=[(0, row) for row in (0, 4, 4, 3)])


@every_combination
def test_rows_repeated(kind, codec, layout):
    cache = make_cache(kind, codec, layout)
    rows = [(0, row) for row in range(B) for _ in range(3)]
    assert_rows(repeat(cache), cache, rows=rows)


@every_combination
def test_rows_inserted(kind, codec, layout):
    """At an index that only the running program knows; what doesn't fit is dropped."""
    cache = make_cache(kind, codec, layout)
    other = make_cache(kind, codec, layout, rows=2, seed=1)
    for row in (0, 3, 4, 7):
        rows = [(0, b) for b in range(B)]
        rows[row : row + 2] = [(1, b) for b in range(2)]
        inserted = insert(cache, other, cases.int32(row))
        assert type(inserted) is type(cache)
        assert_rows(inserted, cache, other, rows=rows[:B])


def test_row_of_a_known_index():
    cache = make_cache("rolling", "int8", "head_major")
    other = make_cache("rolling", "int8", "head_major", rows=2, seed=1)
    inserted = insert_rows(cache, other, 1)
    rows = [(0, 0), (1, 0), (1, 1), (0, 3), (0, 4)]
    assert_rows(inserted, cache, other, rows=rows)


@every_combination
def test_rows_reset(kind, codec, layout):
    """They are as a cache has them that was just allocated."""
    cache = make_cache(kind, codec, layout)
    empty = make_spec(kind, codec, layout).allocate()
    emptied = reset(cache, cases.int32([3, 0, 3]))
    rows = [(1, 0), (0, 1), (0, 2), (1, 3), (0, 4)]
    assert_rows(emptied, cache, empty, rows=rows)


@every_combination
def test_batches_split_and_joined(kind, codec, layout):
    cache = make_cache(kind, codec, layout)
    parts = split(cache)
    spans = ((0, 1), (1, 4), (4, 5))
    for part, (first, last) in zip(parts, spans, strict=True):
        assert_rows(part, cache, rows=[(0, row) for row in range(first, last)])
    rows = [(0, row) for row in (1, 2, 3, 4, 0)]
    assert_rows(join(parts[1], parts[2], parts[0]), cache, rows=rows)


def test_trees_of_caches():
    """One of each kind, and a dense tensor, as the layers of a model may have them."""
    tensor = keras.ops.convert_to_tensor(cases.noise(B, 2, S, K, H))
    tree = {
        "layers": (
            make_cache("static", "int4", "head_major"),
            make_cache("sinks", "bfloat16", "head_major"),
        ),
        "tensor": tensor,
    }
    assert batch_size(tree) == B
    assert_rows(take_rows(tree, [2, 2]), tree, rows=[(0, 2), (0, 2)])
    first, second = split_rows(tree, [2, 3])
    joined = join_rows([second, first])
    assert_rows(joined, tree, rows=[(0, row) for row in (2, 3, 4, 0, 1)])
    inserted = insert_rows(tree, first, 3)
    assert_rows(inserted, tree, rows=[(0, row) for row in (0, 1, 2, 0, 1)])
    emptied = reset_rows(tree, [4])
    assert not cases.numpy(emptied["tensor"])[4].any()
    assert cases.numpy(emptied["tensor"])[:4].all()
    assert crop(tree, 9, 7) is not None
    larger = resize(tree["tensor"], 43, 7)
    assert tuple(larger.shape) == (B, 2, 43, K, H)
    np.testing.assert_array_equal(larger[:, :, :S], tensor)
    ended = with_end(tree, cases.int32([3, 1, 4, 1, 5]))
    for cache in ended["layers"]:
        assert cases.numpy(cache.end).tolist() == [3, 1, 4, 1, 5]
    assert ended["tensor"] is tensor


@pytest.mark.jax_only
@pytest.mark.parametrize("verb", ["insert", "reset"])
@every_combination
def test_donated_rows_are_written_in_place(kind, codec, layout, verb):
    """The result has the arrays of the cache, and no copy of it is made.

    But of bfloat16, which XLA knows on no CPU: it widens and narrows all of an array.
    """
    cache = make_spec(kind, codec, layout, rows=11).allocate()
    other = make_spec(kind, codec, layout, rows=1).allocate()
    verb, arguments = {
        "insert": (insert_rows, (other, cases.int32(1))),
        "reset": (reset_rows, (cases.int32([1, 3]),)),
    }[verb]
    memory = (
        jax.jit(verb, donate_argnums=0)
        .lower(cache, *arguments)
        .compile()
        .memory_analysis()
    )
    assert memory.alias_size_in_bytes == cache.nbytes
    assert codec == "bfloat16" or memory.temp_size_in_bytes < cache.nbytes / 2


# Slots.


@cases.compiled
def step(cache, query, entries, index):
    """Output and the new cache, as the layer computes them."""
    cache, view = cache.update(*entries, index)
    masks = view_masks(view, token_positions(index, query.shape[1]), causal=True)
    return attend(query, view, masks, Scoring(1.0)), cache


class Followed:
    """A cache of one row's entries, and the reference beside it."""

    def __init__(self, kind, codec, layout, capacity=S):
        self.cache = make_spec(
            kind, codec, layout, rows=1, capacity=capacity
        ).allocate()
        self.kind, self.codec, self.layout, self.fill = kind, codec, layout, 0
        self.reference = reference_cache.ReferenceCache(1, **RULES[codec])
        rolling = KINDS.get(kind, kind)
        if isinstance(rolling, Rolling):
            self.reference.window, self.reference.sinks = rolling.window, rolling.sinks

    def write(self, length):
        """New entries; a single one must see what it should."""
        entries = cases.noise(2, 1, length, K, H, seed=100 + self.fill)
        query = cases.noise(1, length, K, H, seed=self.fill)
        index = cases.int32(self.fill)
        output, self.cache = step(self.cache, query, entries, index)
        self.reference.write(0, self.fill, *entries[:, 0])
        self.reference.code_groups(0, self.fill)
        if length == 1:
            expected = self.reference.attend(0, query[0], np.c_[self.fill])
            np.testing.assert_allclose(output[0], expected, rtol=0, atol=1e-5)
        self.fill += length

    def crop(self, length):
        assert crop(self.cache, self.fill, length) is self.cache
        self.fill = length

    def resize(self, slots):
        """A static cache gets so many, a rolling one a window of so many."""
        if self.kind == "static":
            self.cache = resize(self.cache, slots, self.fill)
        else:
            self.cache = resize_window(self.cache, slots, self.fill)
            self.reference.window = slots


@pytest.mark.parametrize("codec, layout", cases.stored(RULES))
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_seen_after_growing_and_shrinking(kind, codec, layout):
    """Groups take more entries to be there at all."""
    followed = Followed(kind, codec, layout, capacity=47)
    large, small = (71, 46) if kind == "static" else (34, 9)
    followed.write(43 if codec == "int4" else 11)
    before = followed.cache.nbytes
    followed.resize(large)
    assert followed.cache.nbytes > before
    followed.write(1)
    followed.resize(small)
    assert followed.cache.nbytes <= before
    followed.write(1)


@pytest.mark.parametrize("codec, layout", cases.stored(RULES))
def test_what_is_seen_after_going_back_and_shrinking(codec, layout):
    """What was gone back to stays, not what was written last."""
    followed = Followed(Rolling(65), codec, layout)
    followed.write(64)
    followed.crop(10)
    followed.resize(8)
    followed.write(1)


@pytest.mark.parametrize("codec, layout", cases.stored(CODECS))
def test_static_entries_survive_a_new_size(codec, layout):
    """And new slots are empty; a size may cut a segment or end with one."""
    cache = make_cache("static", codec, layout, capacity=1033)
    before = [cases.numpy(x) for x in cache.storage.decode()]
    for capacity in (300, 256, 32, 544, 1024, 2081):
        resized = resize(cache, capacity, 17)
        assert type(resized) is type(cache) and resized.capacity == capacity
        fresh = make_spec("static", codec, layout, capacity=capacity).allocate()
        for array, like in zip(
            *map(jax.tree_util.tree_leaves, (resized, fresh)), strict=True
        ):
            assert array.shape == like.shape
        for old, new in zip(before, resized.storage.decode(), strict=True):
            new = cases.numpy(new)
            kept = min(new.shape[1], old.shape[1])
            np.testing.assert_allclose(new[:, :kept], old[:, :kept], rtol=0, atol=1e-4)
            assert not new[:, kept:].any()


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("kind", ["rolling", "sinks"])
def test_cropped_as_far_as_a_ring_reaches(kind, layout):
    """One position back is always there: the newest took the place of none it sees."""
    followed = Followed(kind, "float32", layout)
    for length in (11, 11, 11, 1):
        followed.write(length)
    followed.crop(33)
    followed.write(1)
    with pytest.raises(ValueError, match=r"\[19\] to before \[21\] are overwritten"):
        crop(followed.cache, np.array([34]), np.array([31]))
    grouped = Followed(kind, "int4", "head_major")
    for length in (64, 11):
        grouped.write(length)
    grouped.crop(60)  # into a group that was full
    grouped.write(1)
    grouped.write(1)
    with pytest.raises(ValueError, match="overwritten"):
        crop(grouped.cache, 75, 43)


def test_a_ring_that_overwrote_nothing_goes_back_anywhere():
    for codec, fill in (("float32", 13), ("int4", 64)):
        cache = make_spec("rolling", codec, "head_major").allocate()
        for length in range(fill + 1):
            assert crop(cache, fill, length) is cache
    sinks = make_spec("sinks", "float32", "dense").allocate()
    # Of 16 positions the ring lost the first three, which are sinks.
    for length in range(17):
        assert crop(sinks, 16, length) is sinks
    with pytest.raises(ValueError, match="overwritten"):
        crop(sinks, 17, 10)


@pytest.mark.parametrize("codec, layout", cases.stored(RULES))
def test_a_text_begins_again(codec, layout):
    """Nothing of what a ring lost is needed for that, nor are sinks in a group."""
    for kind in ("rolling", "sinks"):
        followed = Followed(kind, codec, layout)
        for length in (64, 64, 5):
            followed.write(length)
        followed.crop(0)
        for length in (1, 3, 1):
            followed.write(length)
    sinks = make_spec("sinks", codec, layout).allocate()
    if codec == "float32":
        assert crop(sinks, 133, 2) is sinks
    else:
        with pytest.raises(ValueError, match=r"\[?0\]? to before .* are overwritten"):
            crop(sinks, 133, 2)


def test_crop_knows_nothing_of_traced_numbers():
    cache = make_spec("rolling", "float32", "dense").allocate()
    jax.jit(lambda fill: crop(cache, fill, 0) and fill)(cases.int32(99))


# Refusals.


def refusal(verb, *arguments):
    with pytest.raises(ValueError) as caught:
        verb(*arguments)
    return str(caught.value)


def test_rows_that_are_not_there():
    cache = make_cache("static", "float32", "dense")
    for verb in (take_rows, reset_rows):
        empty = np.zeros(0, "int32")
        for rows in ([5], [-1], [0, 1, 99], 3, [[0]], [0.5], [], empty):
            words = refusal(verb, cache, rows)
            assert "`rows`" in words and "0 to 4" in words and "Received" in words


def test_no_cache_at_all():
    for nothing in ((), [], {}):
        assert "`cache` must hold at least one" in refusal(batch_size, nothing)


@pytest.mark.parametrize("repeats", [0, -1, 1.5, True, None, "2"])
def test_repeats(repeats):
    words = refusal(repeat_rows, make_cache("static", "float32", "dense"), repeats)
    assert "`repeats`" in words and repr(repeats) in words


@pytest.mark.parametrize(
    "sizes", [[5, 1], [4], [], [5, 0], [6, -1], [2.5, 2.5], 5, None, "5", [True, 4]]
)
def test_sizes_of_a_split(sizes):
    words = refusal(split_rows, make_cache("static", "float32", "dense"), sizes)
    assert "`sizes`" in words and "5 rows" in words and str(sizes) in words


def test_inserts_that_do_not_fit():
    cache = make_cache("static", "float32", "dense")
    other = make_cache("static", "float32", "dense", rows=2)
    for row in (-1, 4, 5, 2**40):
        words = refusal(insert_rows, cache, other, row)
        assert f"row={row}" in words and "2 rows for 5" in words
    for row in (1.0, 1.5, True, None, "1", [1], np.array([1])):
        words = refusal(insert_rows, cache, other, row)
        assert "`row` must be an integer" in words and repr(row) in words
    for row in (0, cases.int32(0)):
        words = refusal(insert_rows, other, cache, row)
        assert "5 rows for 2" in words
    # Known by its shape even where the row isn't.
    words = refusal(jax.jit(insert_rows), other, cache, cases.int32(0))
    assert "5 rows for 2" in words


def test_caches_that_are_not_alike():
    """Neither inserted nor joined."""
    cache = make_spec("rolling", "float32", "dense").allocate()
    strangers = {
        "kind": make_spec("static", "float32", "dense"),
        "sinks": make_spec("sinks", "float32", "dense"),
        "window": make_spec(Rolling(11), "float32", "dense"),
        "codec": make_spec("rolling", "int8", "head_major"),
        "groups": make_spec("rolling", "int4", "head_major"),
        "dtype": make_spec("rolling", "bfloat16", "dense"),
        "layout": make_spec("rolling", "float32", "head_major"),
    }
    for spec in strangers.values():
        other = spec.allocate()
        words = refusal(insert_rows, cache, other, 0)
        assert "`other`" in words and "Received" in words
        words = refusal(join_rows, [cache, other])
        assert "`caches`" in words and "Received" in words
    for more in (53, 300):
        larger = make_spec("static", "float32", "dense", capacity=more).allocate()
        static = make_spec("static", "float32", "dense").allocate()
        words = refusal(insert_rows, static, larger, 0)
        assert "same capacity" in words and f"{more} slots for 41" in words
    small, large = (
        make_spec("static", "int4", "head_major", capacity=capacity).allocate()
        for capacity in (41, 43)
    )
    words = refusal(insert_rows, small, large, 0)
    assert "same capacity" in words
    assert "at least one" in refusal(join_rows, [])
    assert "same kind" in refusal(insert_rows, (cache, cache), (cache,), 0)


def test_crops_that_go_nowhere():
    cache = make_cache("static", "float32", "dense")
    for fill, length in ((7, 8), (7, -1), ([3, 9, 9, 9, 9], [4, 0, 0, 0, 0])):
        fill, length = np.array(fill), np.array(length)
        words = refusal(crop, cache, fill, length)
        assert "`length`" in words and f"fill={fill.tolist()}" in words
    for stored in (cache, cases.noise(B, 2, S, K, H)):
        words = refusal(crop, stored, 42, 3)
        assert "capacity=41" in words and "fill=42" in words


def test_sizes_that_do_not_hold_what_is_there():
    static = make_cache("static", "float32", "dense")
    words = refusal(resize, static, 16, 17)
    assert "fill=17" in words and "capacity=16" in words
    words = refusal(resize, static, 16, np.array([3, 17, 0, 0, 0]))
    assert "fill=[3, 17, 0, 0, 0]" in words
    for capacity in (0, -1, 2.0, True, None):
        words = refusal(resize, static, capacity, 0)
        assert "`capacity`" in words and repr(capacity) in words
    assert "fill=-1" in refusal(resize, static, 16, -1)


def test_windows_that_do_not_show_what_is_there():
    """A ring overwrote what a larger window would show."""
    rolling = make_cache("rolling", "float32", "dense")
    assert resize_window(rolling, 17, 13) is not None
    words = refusal(resize_window, rolling, 17, 14)
    assert "overwritten" in words and "fill=14" in words
    assert resize_window(rolling, 11, 1009) is not None
    sinks = make_cache("sinks", "int8", "head_major")
    assert "sinks=3" in refusal(resize_window, sinks, 3, 5)
    for window in (0, -1, 2.0, True, None):
        words = refusal(resize_window, rolling, window, 0)
        assert "`window`" in words and repr(window) in words


@pytest.mark.parametrize("fill", [1.0, True, None, "3", [3, 4], [[3]], [], [3, [4]]])
def test_fills_that_are_not_integers(fill):
    static = make_cache("static", "float32", "dense")
    for arguments in (
        (resize, static, 64, fill),
        (resize_window, static, 64, fill),
        (crop, static, fill, 0),
    ):
        words = refusal(*arguments)
        assert "`fill` must be an integer, or one for each of 5 rows" in words
        assert repr(fill) in words
    assert "`length`" in refusal(crop, static, 7, fill)


def test_a_traced_fill_has_a_dtype_and_a_shape():
    static = make_cache("static", "float32", "dense")
    for fill in (np.zeros(3, "int32"), np.zeros((), "float32")):
        with pytest.raises(ValueError, match="`fill` must be an integer"):
            cases.compiled(lambda fill: crop(static, fill, 0))(fill)


def test_caches_that_differ_grow_together():
    """As those of a model of which some layers slide: each in its own way."""
    tree = (
        make_cache("static", "float32", "head_major"),
        make_cache("sinks", "int4", "head_major"),
        keras.ops.convert_to_tensor(cases.noise(B, 2, S, K, H)),
    )
    longer = resize(tree, 53, 7)
    assert [cache.capacity for cache in longer[:1]] == [53]
    assert longer[1] is tree[1]
    assert tuple(longer[2].shape) == (B, 2, 53, K, H)
    wider = resize_window(tree, tree[1].window + 2, 7)
    assert wider[1].window == tree[1].window + 2
    assert wider[0] is tree[0] and wider[2] is tree[2]
