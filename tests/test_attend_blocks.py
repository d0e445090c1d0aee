"""Blocks of a segment, merged, are attention over its slots, for few and many queries.

The blocks are made small, so that a segment has several and a rest.
"""

import attention_cases as cases
import keras
import numpy as np
import pytest
import reference

from keras_kvcache.attention import (
    Scoring,
    attend,
    products,
    softmax,
    view_masks,
)
from keras_kvcache.caches import StaticCache

B, N, K, H, S = 2, 6, 3, 7, 47
# Few queries are read together with whole slots of a dense cache, many head by head.
LENGTHS = {"few": 2, "many": 23}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(softmax, "BLOCK", 11)
    monkeypatch.setattr(products, "DENSE_BLOCK", 13)


def make_cache(layout, fill):
    """One segment of `S` slots, with garbage from `fill` on, and its entries."""
    entries = cases.noise(B, 2, S, K, H)
    stored = entries.copy()
    stored[:, :, fill:] = cases.GARBAGE
    tensor = keras.ops.convert_to_tensor(stored)
    return StaticCache.from_dense(tensor, layout), entries


@pytest.mark.parametrize("index", [0, 9, 24])
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("number", LENGTHS)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_blocks_merge_to_the_whole(layout, number, window, index):
    length = LENGTHS[number]
    fill = index + length
    cache, entries = make_cache(layout, fill)
    query = cases.noise(B, length, N, H, seed=1)

    @cases.compiled
    def run(query, index):
        positions = index + keras.ops.arange(length, dtype="int32")[None]
        view = cache.view(keras.ops.reshape(index, (1,)) + length)
        masks = view_masks(view, positions, causal=True, sliding_window=window)
        return attend(query, view, masks, Scoring(0.3))

    output = cases.numpy(run(keras.ops.convert_to_tensor(query), cases.int32(index)))
    for row in range(B):
        expected, _ = reference.attend(
            np.float64(query[row]),
            np.float64(entries[row, 0]),
            np.float64(entries[row, 1]),
            0.3,
            causal=True,
            window=window,
            positions=range(index, fill),
        )
        np.testing.assert_allclose(output[row], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("number", LENGTHS)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_a_mask_may_hide_all_of_a_block_or_of_a_query(layout, number):
    length = LENGTHS[number]
    cache, entries = make_cache(layout, S)
    query = cases.noise(B, length, N, H, seed=1)
    mask = np.random.default_rng(2).random((B, N, length, S)) < 0.5
    mask[..., 11:26] = False  # whole blocks
    mask[..., 33:44] = True  # a block without a hidden slot but for that query
    mask[:, :, 1] = False  # a query
    view = cache.view()

    @cases.compiled
    def run(query, mask):
        positions = keras.ops.arange(length, dtype="int32")[None]
        return attend(
            query, view, view_masks(view, positions, attention_mask=mask), Scoring(1)
        )

    tensors = map(keras.ops.convert_to_tensor, (query, mask))
    output = cases.numpy(run(*tensors))
    assert not output[:, 1].any()
    for row in range(B):
        expected, _ = reference.attend(
            np.float64(query[row]),
            np.float64(entries[row, 0]),
            np.float64(entries[row, 1]),
            1,
            mask=mask[row],
        )
        np.testing.assert_allclose(output[row], expected, rtol=0, atol=1e-5)


@pytest.mark.jax_only
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_blocks_have_gradients(layout):
    """A prompt's cached states may be trained through, as in prefix tuning."""
    import jax

    cache, _ = make_cache(layout, S)
    length = LENGTHS["many"]
    query = cases.noise(B, length, N, H, seed=1)
    positions = cases.int32(np.arange(20, 20 + length)[None])

    def loss(query, blocks):
        view = cache.view()
        masks = view_masks(view, positions, causal=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(softmax, "BLOCK", blocks)
            return keras.ops.sum(attend(query, view, masks, Scoring(0.3)) ** 2)

    in_blocks, whole = (jax.grad(loss)(query, blocks) for blocks in (11, S))
    np.testing.assert_allclose(in_blocks, whole, rtol=0, atol=1e-4)


def attend_in_blocks_of_ten(slots, monkeypatch):
    """A call that attends a prompt causally to a segment, and its arguments."""
    monkeypatch.setattr(softmax, "BLOCK", 10)
    length = LENGTHS["many"]
    entries = cases.noise(B, 2, slots, K, H)
    cache = StaticCache.from_dense(keras.ops.convert_to_tensor(entries))
    query = keras.ops.convert_to_tensor(cases.noise(B, length, N, H, seed=1))
    positions = keras.ops.convert_to_tensor(np.arange(length, dtype="int32")[None])

    def run(query, positions):
        view = cache.view()
        return attend(
            query, view, view_masks(view, positions, causal=True), Scoring(0.3)
        )

    return run, (query, positions), entries


@pytest.mark.parametrize("slots", [47, 45])
def test_segments_that_blocks_do_not_divide(monkeypatch, slots):
    run, arguments, entries = attend_in_blocks_of_ten(slots, monkeypatch)
    query, _ = map(cases.numpy, arguments)
    output = cases.numpy(cases.compiled(run)(*arguments))
    for row in range(B):
        expected, _ = reference.attend(
            query[row],
            *np.float64(entries[row]),
            0.3,
            causal=True,
            positions=range(query.shape[1]),
        )
        np.testing.assert_allclose(output[row], expected, rtol=0, atol=1e-5)


@pytest.mark.jax_only
def test_blocks_leave_no_rest_where_half_of_one_divides(monkeypatch):
    """A rest is a second piece of program, in every layer of a model."""
    import jax

    def count_products(slots):
        run, arguments, _ = attend_in_blocks_of_ten(slots, monkeypatch)
        return str(jax.make_jaxpr(run)(*arguments)).count("dot_general")

    one_piece = count_products(40)
    assert one_piece > 0
    assert count_products(45) == one_piece
    assert count_products(47) == 2 * one_piece
