"""Masks against their rules in NumPy."""

import attention_cases as cases
import keras
import numpy as np
import pytest

from keras_kvcache.ops import Segment, View, align_mask, check_mask_shape, view_masks
from keras_kvcache.ops.softmax import masked_softmax

QUERY = np.array([[3, 4], [0, 1], [9, 10]])  # positions of 2 queries in 3 rows


@pytest.mark.parametrize("fill", [None, [7], [5, 2, 11]])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 1, 3])
def test_rules_by_position(fill, causal, window):
    """Slots of two segments, not in order, one of them without a position."""
    positions = [np.array([[0, 1, 2, 3, 4]]), np.array([[9, -1, 7, 8, 5, 6, 10]])]
    segments = tuple(Segment(None, None, cases.int32(p)) for p in positions)
    view = View(segments, 1, 1, None if fill is None else cases.int32(fill))
    masks = view_masks(view, cases.int32(QUERY), causal=causal, sliding_window=window)
    assert len(masks) == 2
    for mask, slots in zip(masks, positions, strict=True):
        expected = np.ones((3, 1, 2, slots.shape[1]), bool)
        for row, t, s in np.ndindex(3, 2, slots.shape[1]):
            slot, query = slots[0, s], QUERY[row, t]
            if fill is not None:
                expected[row, 0, t, s] &= 0 <= slot < np.resize(fill, 3)[row]
            if causal:
                expected[row, 0, t, s] &= slot <= query
            if window:
                expected[row, 0, t, s] &= abs(query - slot) < window
        if mask is None:
            assert fill is None and not causal and not window
        else:
            got = np.broadcast_to(cases.numpy(mask), expected.shape)
            np.testing.assert_array_equal(got, expected)


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


@pytest.mark.parametrize("axis", [-1, (1, 2)])
def test_softmax(axis):
    scores, mask = 5 * cases.noise(3, 5, 7), cases.noise(3, 5, 7, seed=1) > 0
    mask[1] = False
    weights = np.exp(np.float64(scores)) * mask
    total = weights.sum(axis, keepdims=True)
    expected = weights / np.where(total > 0, total, 1)
    scores, mask = map(keras.ops.convert_to_tensor, (scores, mask))
    got = masked_softmax(scores, mask, axis)
    np.testing.assert_allclose(cases.numpy(got), expected, rtol=0, atol=1e-6)
    assert not cases.numpy(got)[1].any()
    everything = masked_softmax(scores, None, axis)
    np.testing.assert_allclose(cases.numpy(everything).sum(axis), 1, rtol=0, atol=1e-6)
