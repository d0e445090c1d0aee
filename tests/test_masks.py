"""Masks against their rules in NumPy."""

import attention_cases as cases
import keras
import numpy as np
import pytest

from keras_kvcache.attention import Segment, View, view_masks
from keras_kvcache.attention.masks import align_mask, check_mask_shape
from keras_kvcache.attention.softmax import masked_softmax

QUERY = np.array([[3, 4], [0, 1], [9, 10]])  # positions of 2 queries in 3 rows
# Slots of three segments, not in order, one of them without a position; the last one
# differs row by row.
IN_ORDER = np.array([[0, 1, 2, 3, 4]])
OUT_OF_ORDER = np.array([[9, -1, 7, 8, 5, 6, 10]])
ROW_BY_ROW = np.array([[3, 0, 1], [-1, 11, 1], [9, 10, 8]])
POSITIONS = (IN_ORDER, OUT_OF_ORDER, ROW_BY_ROW)


def make_view(fill=None, **rules):
    """A view of the three segments, of which only one has its slots in order."""
    first, *others = map(cases.int32, POSITIONS)
    # Masks don't look at what the slots hold.
    held = dict(layout=None, codec=None, head_dim=1, value_dim=1)
    segments = (
        Segment((), first, **held, first_position=0),
        *(Segment((), positions, **held) for positions in others),
    )
    fill = None if fill is None else cases.int32(fill)
    return View(segments, 1, 1, fill, **rules)


def check(masks, rule, heads=1):
    """Masks against `rule(row, head, t, position)`, slot by slot."""
    assert len(masks) == 3
    for mask, slots in zip(masks, POSITIONS, strict=True):
        expected = np.ones((3, heads, 2, slots.shape[1]), bool)
        for row, head, t, s in np.ndindex(*expected.shape):
            position = slots[row % len(slots), s]
            seen = rule(row, head, t, position) and position >= 0
            expected[row, head, t, s] = seen
        got = True if mask is None else cases.numpy(mask)
        np.testing.assert_array_equal(np.broadcast_to(got, expected.shape), expected)


@pytest.mark.parametrize("fill", [None, [7], [5, 2, 11]])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 1, 3])
def test_rules_by_position(fill, causal, window):
    masks = view_masks(
        make_view(fill), cases.int32(QUERY), causal=causal, sliding_window=window
    )

    def rule(row, head, t, position):
        query = QUERY[row, t]
        return (
            (fill is None or position < np.resize(fill, 3)[row])
            and (not causal or position <= query)
            and (not window or abs(query - position) < window)
        )

    check(masks, rule)
    # Nothing is computed for slots that are all there and all seen.
    assert (masks[0] is None) == (fill is None and not causal and not window)


@pytest.mark.parametrize("of_layer, of_view", [(None, 3), (2, 5), (5, 2), (4, None)])
@pytest.mark.parametrize("sinks", [0, 2])
def test_the_narrower_window_counts_and_hides_no_sink(of_layer, of_view, sinks):
    masks = view_masks(
        make_view([11], window=of_view, sinks=sinks),
        cases.int32(QUERY),
        causal=True,
        sliding_window=of_layer,
    )
    window = min(width for width in (of_layer, of_view) if width)

    def rule(row, head, t, position):
        behind = QUERY[row, t] - position
        return behind >= 0 and (behind < window or position < sinks)

    check(masks, rule)


@pytest.mark.parametrize("shape", [(3, 5, 2, 11), (1, 1, 2, 8), (3, 1, 1, 11)])
def test_users_mask_is_over_positions(shape):
    """Whatever slots they have; it takes the place of the fill, and has an end."""
    mask = np.random.default_rng(0).random(shape) < 0.5
    masks = view_masks(
        make_view([2]),
        cases.int32(QUERY),
        attention_mask=keras.ops.convert_to_tensor(mask),
    )
    mask = np.broadcast_to(mask, (3, 5, 2, shape[3]))

    def rule(row, head, t, position):
        return position < shape[3] and mask[row, head, t, position]

    check(masks, rule, heads=5)


def test_users_mask_of_all_positions_at_once():
    mask = np.array([[True], [False]])[None, None]
    masks = view_masks(
        make_view(),
        cases.int32(QUERY),
        attention_mask=keras.ops.convert_to_tensor(mask),
    )
    check(masks, lambda row, head, t, position: t == 0)


def test_masks_of_queries_and_of_new_entries():
    """What was written before is seen, whatever stands in the masks of new entries."""
    query_mask = np.array([[True, True], [True, False], [False, True]])
    entry_mask = np.array([[True, False], [False, True], [True, True]])
    index = [3, 0, 9]
    masks = view_masks(
        make_view([11]),
        cases.int32(QUERY),
        query_mask=query_mask,
        entry_masks=[keras.ops.convert_to_tensor(entry_mask)],
        index=cases.int32(index),
    )

    def rule(row, head, t, position):
        entry = position - index[row]
        is_new = 0 <= entry < 2
        return query_mask[row, t] and not (is_new and not entry_mask[row, entry])

    check(masks, lambda *place: place[3] < 11 and rule(*place))


@pytest.mark.parametrize(
    "shape, aligned",
    [
        ((2, 5), (1, 1, 2, 5)),
        ((3, 2, 5), (3, 1, 2, 5)),
        ((3, 4, 2, 5), (3, 4, 2, 5)),
        ((1, 1), (1, 1, 1, 1)),
        ((1, 4, 1, 5), (1, 4, 1, 5)),
    ],
)
def test_users_mask(shape, aligned):
    mask = np.zeros(shape, "float32")
    check_mask_shape(mask, (3, 4, 2, 5))
    check_mask_shape(mask, (None, 4, None, 5))
    got = align_mask(mask)
    assert tuple(got.shape) == aligned
    assert cases.numpy(got).dtype == bool


@pytest.mark.parametrize(
    "shape", [(), (5,), (5, 2), (2, 4), (4, 2, 5), (3, 2, 2, 5), (1, 3, 4, 2, 5)]
)
def test_users_mask_that_does_not_fit(shape):
    with pytest.raises(ValueError, match="`attention_mask`.*Received"):
        check_mask_shape(np.zeros(shape), (3, 4, 2, 5))


def test_softmax():
    scores, mask = 5 * cases.noise(3, 5, 7), cases.noise(3, 5, 7, seed=1) > 0
    mask[1, 2] = False
    weights = np.exp(np.float64(scores)) * mask
    total = weights.sum(-1, keepdims=True)
    expected = weights / np.where(total > 0, total, 1)
    scores, mask = map(keras.ops.convert_to_tensor, (scores, mask))
    got = masked_softmax(scores, mask)
    np.testing.assert_allclose(cases.numpy(got), expected, rtol=0, atol=1e-6)
    assert not cases.numpy(got)[1, 2].any()
    everything = masked_softmax(scores)
    np.testing.assert_allclose(cases.numpy(everything).sum(-1), 1, rtol=0, atol=1e-6)
