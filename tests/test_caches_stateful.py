"""Random sequences of calls, on every kind of cache, against one that keeps all.

The ordinary run takes each kind, codec and layout, with heads and indices that go
round. With `KERAS_KVCACHE_NIGHTLY=1` in the environment it's every combination, in new
sequences each time.
"""

import copy
import functools
import itertools
import os
from dataclasses import dataclass
from typing import NamedTuple

import attention_cases as cases
import jax
import keras
import numpy as np
import pytest
import reference_cache
import reference_codecs
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from keras_kvcache.attention import Scoring, attend, token_positions, view_masks
from keras_kvcache.caches import (
    CacheSpec,
    Int4,
    Rolling,
    crop,
    insert_rows,
    join_rows,
    repeat_rows,
    reset_rows,
    resize,
    resize_window,
    segmentation,
    split_rows,
    take_rows,
)

pytestmark = pytest.mark.jax_only

NIGHTLY = os.environ.get("KERAS_KVCACHE_NIGHTLY", "0") != "0"

B, S, H, W, GROUP = 3, 23, 7, 7, 5
CHUNK = 11  # tokens; more than the window
LARGER = {"static": 37, "rolling": 13, "sinks": 13}
SCALE = H**-0.5


@dataclass(frozen=True)
class ShortGroups(Int4):
    """The codec with groups that short sequences fill."""

    group = GROUP


class Heads(NamedTuple):
    query: int
    key_value: int
    value_dim: int = H


def int4(values):
    """What rotated values of 4 bits come back as."""
    turn = reference_codecs.rotation(values.shape[-1])
    return reference_codecs.int4(values @ turn) @ turn.T


def far_from_steps(values):
    """Values near the middle of their int4 steps, so that rounding decides no code."""
    turn = np.float64(reference_codecs.rotation(values.shape[-1]))
    turned = values @ turn
    scale = abs(turned).max(axis=-1, keepdims=True).astype("float32") / 7.5
    scale = reference_codecs.bfloat16(scale)
    steps = np.clip(turned / scale, -7.5, 7.5)
    inside = np.floor(steps) + 0.25 + 0.5 * (steps % 1)
    return np.where(abs(steps) > 7.4, np.sign(steps) * 7.5, inside) * scale @ turn.T


def int4_of_group(keys):
    """What a group comes back as, in sequences where no rounding is a toss-up.

    Keys that were coded before may lie right between two steps of another range.
    """
    steps, _, _ = reference_codecs.int4_steps(keys)
    assume(np.abs(steps % 1 - 0.5).min() > 3e-6)
    return reference_codecs.int4_of_group(keys)


KINDS = {"static": "static", "rolling": Rolling(W), "sinks": Rolling(W, sinks=2)}
CODECS = {
    "float32": ("float32", dict(code=lambda x: x)),
    # Rounded before the reference gets them, as the sinks are, too.
    "bfloat16": ("bfloat16", dict(code=lambda x: x)),
    "int8": ("int8", dict(code=reference_codecs.int8)),
    "int4": (ShortGroups(), dict(code=int4, group=GROUP, code_group=int4_of_group)),
}
HEADS = {"mha": Heads(3, 3), "gqa": Heads(6, 2, value_dim=5), "mqa": Heads(5, 1)}
INDICES = ("shared", "per_row")
USES = ("self", "cross")


class Combination(NamedTuple):
    """What a cache is made of and used for."""

    kind: str
    codec: str
    layout: str
    heads: str
    index: str
    use: str

    def allocate(self):
        """An empty cache whose slots are full of garbage."""
        heads = HEADS[self.heads]
        cache = CacheSpec(
            B,
            S,
            heads.key_value,
            H,
            heads.value_dim,
            codec=CODECS[self.codec][0],
            layout=self.layout,
            kind=KINDS[self.kind],
        ).allocate()
        random = np.random.default_rng(0)

        def spoil(array):
            dtype = keras.backend.standardize_dtype(array.dtype)
            if dtype == "int32":  # positions
                return array
            if dtype == "int16":  # bits of bfloat16
                garbage = keras.ops.full(array.shape, cases.GARBAGE, "bfloat16")
                return keras.ops.view(garbage, dtype)
            if "int" in dtype:
                limits = np.iinfo(dtype)
                codes = random.integers(limits.min, limits.max + 1, array.shape)
                return keras.ops.convert_to_tensor(codes, dtype)
            return keras.ops.full_like(array, cases.GARBAGE)

        return jax.tree_util.tree_map(spoil, cache)

    def make_reference(self):
        rules = CODECS[self.codec][1]
        if self.kind != "static":
            rolling = KINDS[self.kind]
            rules = dict(rules, window=rolling.window, sinks=rolling.sinks)
        return reference_cache.ReferenceCache(B, **rules)


def combinations():
    """All, or what the ordinary run has time for."""
    groups = [(kind, *pair) for kind in KINDS for pair in cases.stored(CODECS)]
    if NIGHTLY:
        return [
            Combination(*group, *rest)
            for group, *rest in itertools.product(groups, HEADS, INDICES, USES)
        ]
    return [
        Combination(*group, tuple(HEADS)[number % 3], INDICES[number // 3 % 2], use)
        for number, group in enumerate(groups)
        for use in USES
    ]


@cases.compiled
def step(cache, query, key, value, index, end):
    """Writes and attends, as the layer does."""
    cache, view = cache.with_end(end).update(key, value, index)
    positions = token_positions(index, query.shape[1])
    masks = view_masks(view, positions, causal=True)
    return attend(query, view, masks, Scoring(SCALE)), cache.with_end(None)


@cases.compiled
def read(cache, query):
    """Attends all that was written, as a layer without an index does."""
    view = cache.view()
    positions = token_positions(0, query.shape[1])
    return attend(query, view, view_masks(view, positions), Scoring(SCALE))


take = cases.compiled(take_rows)
reset = cases.compiled(reset_rows)


@cases.compiled
def rejoin(cache):
    """Repeats all rows and brings the copies back in the order `2, 0, 1`."""
    first, middle, last = split_rows(repeat_rows(cache, 2), [1, 4, 1])
    _, second, _ = split_rows(middle, [1, 1, 2])
    return join_rows([last, first, second])


@cases.compiled
def insert(cache, other, source, row):
    return insert_rows(cache, take_rows(other, source), row)


@functools.cache
def resizer(verb, slots):
    """A compiled `resize` or `resize_window`."""
    return cases.compiled(lambda cache, fill: verb(cache, slots, fill))


def each_row(*choices):
    """One of some values for each row."""
    return st.lists(st.sampled_from(choices), min_size=B, max_size=B)


class CacheMachine(RuleBasedStateMachine):
    """A cache, the reference, and what a careful caller knows of both."""

    def __init__(self, combination):
        super().__init__()
        self.combination = combination
        self.heads = HEADS[combination.heads]
        self.is_rolling = combination.kind != "static"
        self.is_shared = combination.index == "shared"
        self.cache = combination.allocate()
        self.reference = combination.make_reference()
        self.capacity = self.window if self.is_rolling else S
        self.fill = [0] * B  # the index of the next call
        self.high = [0] * B  # the most positions that were written
        self.held = [0] * B  # positions before it are overwritten
        self.random = np.random.default_rng(1)
        self.saved = None

    @property
    def window(self):
        return self.reference.window

    # 1. Writing.

    @precondition(lambda self: self.combination.use == "self")
    @rule(brought=each_row(CHUNK, 1, 3, 7, 0, 2, 5, 10))
    def write_a_chunk(self, brought):
        """Rows bring as many entries as they like, padded to one length."""
        self._write(CHUNK, brought[:1] * B if self.is_shared else brought)

    @precondition(lambda self: self.combination.use == "self")
    @rule(brought=each_row(1, 1, 0))
    def write_a_token(self, brought):
        self._write(1, brought[:1] * B if self.is_shared else brought)

    @precondition(lambda self: self.combination.use == "cross")
    @rule(rows=each_row(True, False))
    def write_whole(self, rows):
        """All that a cache takes, for rows that are empty or begin again."""
        chosen = [
            self.is_shared or row or not fill
            for row, fill in zip(rows, self.fill, strict=True)
        ]
        self.fill = [0 if row else self.capacity for row in chosen]
        for first in range(0, self.capacity, CHUNK):
            length = min(CHUNK, self.capacity - first)
            self._write(CHUNK, [length if row else 0 for row in chosen])

    def _write(self, length, brought):
        """Writes `brought[b]` entries of row `b` at its fill, and compares."""
        index, limit = list(self.fill), np.inf if self.is_rolling else self.capacity
        query, key, value = self._draw(length, brought)
        end = [i + n for i, n in zip(index, brought, strict=True)]
        output, self.cache = self._step(query, key, value, index, end)
        # A chunk that may evict what it still needs shows its own keys uncoded.
        codes_late = self.is_rolling and length > 1
        for row, first in enumerate(index):
            kept = int(max(min(brought[row], limit - first), 0))
            entries = self._stored(key[row, :kept]), self._stored(value[row, :kept])
            self.reference.write(row, first, *entries)
            if not codes_late:
                self.reference.code_groups(row, first)
            self._compare(row, query[row, :kept], output[row, :kept], first)
            if codes_late:
                self.reference.code_groups(row, first)
            self.fill[row] = first + kept
        self._note_what_is_overwritten()

    def _stored(self, entries):
        is_narrow = self.combination.codec == "bfloat16"
        return reference_codecs.bfloat16(entries) if is_narrow else entries

    def _draw(self, length, brought):
        """A query, keys and values, with garbage where there's padding."""
        heads, shape = self.heads, (B, length)
        query = self.random.normal(size=(*shape, heads.query, H))
        key = self.random.normal(size=(*shape, heads.key_value, H))
        value = self.random.normal(size=(*shape, heads.key_value, heads.value_dim))
        if self.combination.codec == "int4":
            value = far_from_steps(value)
        for row, number in enumerate(brought):
            key[row, number:] = value[row, number:] = cases.GARBAGE
        return (x.astype("float32") for x in (query, key, value))

    def _step(self, query, key, value, index, end):
        given = index[0] if self.is_shared else index
        arrays = query, key, value, cases.int32(given), cases.int32(end)
        output, cache = step(self.cache, *arrays)
        return cases.numpy(output), cache

    def _note_what_is_overwritten(self):
        self.high = np.maximum(self.high, self.fill).tolist()
        if self.is_rolling:
            slots, group = self.cache.storage.slots, self.cache.codec.group
            begun = -(-np.array(self.high) // group) * group
            self.held = np.maximum(self.held, begun - slots).tolist()

    @precondition(lambda self: self.combination.use == "self")
    @rule(
        length=st.sampled_from((CHUNK, 1)),
        where=each_row(-1, 0, -4, -(2**31), 2**31 - 1, 2**30, S + 99),
    )
    def write_where_nothing_fits(self, length, where):
        """Not a bit changes."""
        full = self.cache.max_length
        index = [-2 if full is None and i >= 0 else i or full for i in where]
        index = index[:1] * B if self.is_shared else index
        query, key, value = self._draw(length, [length] * B)
        _, after = self._step(query, key, value, index, [2**30] * B)
        pair = map(jax.tree_util.tree_leaves, (self.cache, after))
        for old, new in zip(*pair, strict=True):
            assert np.asarray(old).tobytes() == np.asarray(new).tobytes()

    # 2. Going back.

    @precondition(lambda self: self.combination.use == "self" and any(self.fill))
    @rule(steps=each_row(2, 1, 8, 3, 13, 0, 5, 21))
    def go_back(self, steps):
        steps = steps[:1] * B if self.is_shared else steps
        lengths = np.maximum(np.subtract(self.fill, steps), 0)
        high, is_held = np.array(self.high), np.ones(B, bool)
        if self.is_rolling:
            sees = np.maximum(lengths - self.window + 1, self.reference.sinks)
            group = self.cache.codec.group
            needs = np.minimum(sees, lengths // group * group)
            is_held = (needs >= self.held) | (lengths <= needs)
        if is_held.all():
            assert crop(self.cache, high, lengths) is self.cache
            self.fill = lengths.tolist()
        else:
            with pytest.raises(ValueError, match="overwritten"):
                crop(self.cache, high, lengths)

    # 3. Rows that come and go.

    @rule(rows=each_row(*range(B)), in_parts=st.booleans())
    def take(self, rows, in_parts):
        if in_parts:
            self.cache, rows = rejoin(self.cache), [2, 0, 1]
        else:
            self.cache = take(self.cache, cases.int32(rows))
        for lists in self._per_row():
            lists[:] = [copy.copy(lists[row]) for row in rows]

    def _per_row(self):
        return (
            self.reference.exact,
            self.reference.coded,
            self.fill,
            self.high,
            self.held,
        )

    @rule()
    def save(self):
        """Whoever holds a cache holds it unchanged."""
        rows = [[copy.copy(row) for row in lists] for lists in self._per_row()]
        self.saved = self.cache, rows

    def _has_saved(self):
        """Whether rows saved fit to those there are."""
        if self.saved is None:
            return False
        cache, (_, _, fill, _, _) = self.saved
        is_alike = [x.shape for x in jax.tree_util.tree_leaves(cache)] == [
            x.shape for x in jax.tree_util.tree_leaves(self.cache)
        ]
        return is_alike and (not self.is_shared or fill == self.fill)

    @precondition(_has_saved)
    @rule(source=st.integers(0, B - 1), row=st.integers(0, B - 1))
    def insert(self, source, row):
        other, saved = self.saved
        places = cases.int32([source]), cases.int32(row)
        self.cache = insert(self.cache, other, *places)
        for lists, others in zip(self._per_row(), saved, strict=True):
            lists[row] = copy.copy(others[source])

    @precondition(lambda self: self.combination.use == "self" and max(self.fill) > W)
    @rule(row=st.integers(0, B - 1))
    def reset(self, row):
        rows = list(range(B)) if self.is_shared else [row] * B
        self.cache = reset(self.cache, cases.int32(rows))
        for row in rows:
            self.fill[row] = self.high[row] = self.held[row] = 0

    # 4. More slots and fewer.

    @precondition(lambda self: self.combination.use == "self")
    @precondition(lambda self: not self.is_rolling or self.fill == self.high)
    @rule()
    def resize(self):
        """Entries survive; only the nightly run has time for both sizes."""
        larger = LARGER[self.combination.kind]
        small = W if self.is_rolling else S
        grows = self.capacity == small
        if grows and max(self.held) > 0 or not grows and not self._fits(small):
            return
        self._resize(larger if grows else small)
        if grows and not NIGHTLY:
            self._resize(small)

    def _fits(self, capacity):
        return self.is_rolling or max(self.fill) <= capacity

    def _resize(self, capacity):
        verb = resize_window if self.is_rolling else resize
        self.cache = resizer(verb, capacity)(self.cache, cases.int32(self.fill))
        self.capacity = capacity
        if self.is_rolling:
            self.reference.window = capacity
        else:  # What is past the end is gone.
            self.high = np.minimum(self.high, capacity).tolist()
        self._note_what_is_overwritten()

    # What must hold whatever happened.

    @invariant()
    def next_token_sees_what_it_should(self):
        if self.combination.use == "cross":
            return self._compare_whole()
        query, key, value = self._draw(1, [1] * B)
        end = [index + 1 for index in self.fill]
        output, _ = self._step(query, key, value, self.fill, end)
        for row, index in enumerate(self.fill):
            if self.is_rolling or index < self.capacity:
                reference = copy.copy(self.reference)
                reference.exact, reference.coded = (
                    [list(row) for row in rows]
                    for rows in (reference.exact, reference.coded)
                )
                entries = self._stored(key[row]), self._stored(value[row])
                reference.write(row, index, *entries)
                reference.code_groups(row, index)
                self._compare(row, query[row], output[row], index, reference)

    def _compare_whole(self):
        query, _, _ = self._draw(2, [2] * B)
        output = cases.numpy(read(self.cache, query))
        for row in range(B):
            if self.fill[row]:
                self._compare(row, query[row], output[row], None)

    def _compare(self, row, query, output, first, reference=None):
        """Queries of a row, from position `first` on, against the reference."""
        if not len(query):
            return
        positions = None if first is None else first + np.c_[: len(query)]
        expected = (reference or self.reference).attend(row, query, positions, SCALE)
        np.testing.assert_allclose(output, expected, rtol=0, atol=1e-5)


@pytest.fixture(scope="module", autouse=True)
def short_segments():
    """Short caches of several segments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segmentation, "FIRST_SEGMENT", 10)
        yield


@pytest.fixture(autouse=True)
def forget_programs_of_a_combination():
    """All of them together are more than a process may hold."""
    yield
    jax.clear_caches()


@pytest.mark.parametrize("combination", combinations(), ids="-".join)
def test_any_sequence_of_calls(combination):
    run_state_machine_as_test(
        lambda: CacheMachine(combination),
        settings=settings(
            max_examples=8 if NIGHTLY else 6,
            stateful_step_count=30,
            deadline=None,
            derandomize=not NIGHTLY,
            suppress_health_check=list(HealthCheck),
        ),
    )
