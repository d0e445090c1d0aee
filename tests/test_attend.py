"""Attention over segments, apart from any layer."""

import attention_cases as cases
import keras
import numpy as np
import pytest
import reference

from keras_kvcache.attention import (
    Scoring,
    Segment,
    View,
    attend,
    attend_with_scores,
    softmax,
    view_masks,
)
from keras_kvcache.attention.codecs import AsGiven
from keras_kvcache.attention.segments import HEAD_MAJOR

B, T, N, K, H, HV = 3, 5, 6, 2, 7, 11
SIZES = (3, 1, 13)


def make_view(keys, values):
    """Segments of `SIZES` slots."""
    segments, first = [], 0
    for size in SIZES:
        part = slice(first, first + size)
        arrays = (
            keras.ops.convert_to_tensor(keys[:, part].transpose(0, 2, 3, 1)),
            keras.ops.convert_to_tensor(values[:, part].transpose(0, 2, 1, 3)),
        )
        positions = cases.int32(np.arange(first, first + size)[None])
        segments.append(Segment(arrays, positions, HEAD_MAJOR, AsGiven(), H, HV))
        first += size
    return View(tuple(segments), K, HV, None)


def test_no_queries_get_no_outputs():
    view = make_view(cases.noise(B, 17, K, H), cases.noise(B, 17, K, HV))
    masks = view_masks(view, cases.int32(np.zeros((1, 0))), causal=True)
    query = keras.ops.convert_to_tensor(cases.noise(B, 0, N, H))
    assert tuple(attend(query, view, masks, Scoring(0.3)).shape) == (B, 0, N, HV)


@pytest.mark.parametrize("soft_cap", [None, 1.5])
@pytest.mark.parametrize("first", [0, 12])
def test_segments_merge_to_the_whole(soft_cap, first):
    query, keys = cases.noise(B, T, N, H), cases.noise(B, 17, K, H, seed=1)
    values = cases.noise(B, 17, K, HV, seed=2)
    positions = cases.int32(first + np.arange(T)[None])
    view = make_view(keys, values)
    masks = view_masks(view, positions, causal=True, sliding_window=7)
    query_tensor = keras.ops.convert_to_tensor(query)
    output = attend(query_tensor, view, masks, Scoring(0.3, soft_cap))
    beside, scores = attend_with_scores(
        query_tensor, view, masks, Scoring(0.3, soft_cap)
    )
    for row in range(B):
        expected, weights = reference.attend(
            np.float64(query[row]),
            np.float64(keys[row]),
            np.float64(values[row]),
            0.3,
            causal=True,
            window=7,
            soft_cap=soft_cap,
            positions=range(first, first + T),
        )
        for got in (output, beside):
            np.testing.assert_allclose(
                cases.numpy(got)[row], expected, rtol=0, atol=1e-5
            )
        np.testing.assert_allclose(cases.numpy(scores)[row], weights, rtol=0, atol=1e-5)


@pytest.mark.parametrize("first, read", [(0, [0]), (3, [0, 1]), (4, [0, 1, 2])])
def test_segments_that_nobody_attends_are_not_read(first, read, monkeypatch):
    reads = []
    keys, values = cases.noise(B, 17, K, H, seed=1), cases.noise(B, 17, K, HV, seed=2)
    view = make_view(keys, values)
    scores_of = softmax.scores_of

    def noted(segment, *arguments):
        reads.append(SIZES.index(segment.positions.shape[1]))
        return scores_of(segment, *arguments)

    monkeypatch.setattr(softmax, "scores_of", noted)
    masks = view_masks(view, cases.int32([[first]]), causal=True)
    attend(
        keras.ops.convert_to_tensor(cases.noise(B, 1, N, H)), view, masks, Scoring(0.3)
    )
    assert reads == read


def test_large_scores_do_not_overflow():
    """Differences of 1e5 between segments leave the largest score alone."""
    keys = np.zeros((1, 17, K, H), "float32")
    keys[:, 3, :, 0] = 1e5
    keys[:, 16, :, 0] = 3e5
    values = cases.noise(1, 17, K, HV)
    query = np.zeros((1, 1, N, H), "float32")
    query[..., 0] = 1.0
    view = make_view(keys, values)
    output = attend(keras.ops.convert_to_tensor(query), view, (None,) * 3, Scoring(1.0))
    expected = np.repeat(values[:, 16:], N // K, axis=2)
    np.testing.assert_array_equal(cases.numpy(output), expected)
