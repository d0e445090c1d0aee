"""One token on a GPU: projected as two, to the same numbers."""

import attention_cases as cases
import numpy as np
import pytest
from conftest import make_lm

from keras_kvcache.layers import projections


@pytest.fixture
def has_triton(monkeypatch):
    monkeypatch.setattr(projections, "has_triton", lambda: True)


@pytest.mark.usefixtures("has_triton")
@pytest.mark.parametrize(
    "shape, rows", [((1, 1, 7), 2), ((1, 1, 3, 5), 2), ((3, 1, 7), 3), ((1, 2, 7), 1)]
)
def test_only_one_token_is_doubled(shape, rows):
    shapes = []

    def triple(inputs):
        shapes.append(inputs.shape)
        return 3 * inputs

    inputs = cases.noise(*shape)
    outputs = projections.project(triple, inputs)
    np.testing.assert_allclose(cases.numpy(outputs), 3 * inputs, rtol=1e-6)
    assert shapes == [(rows, *shape[1:])]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_model_says_the_same(kind, monkeypatch):
    prompt = [5, 3, 11, 2, 7]
    expected = make_lm(kind).generate([prompt], max_new_tokens=13)
    monkeypatch.setattr(projections, "has_triton", lambda: True)
    lm = make_lm(kind)
    np.testing.assert_array_equal(lm.generate([prompt], max_new_tokens=13), expected)
