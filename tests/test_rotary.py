"""Rotation against complex multiplication, and against keras-hub's layer."""

import attention_cases as cases
import keras
import numpy as np
import pytest
import reference

from keras_kvcache.layers import RotaryEmbedding


@pytest.mark.parametrize(
    "options, formula",
    [
        (dict(), dict()),
        (dict(max_wavelength=500000.0), dict(base=500000.0)),
        (dict(rotary_dim=6), dict(rotary_dim=6)),
        (dict(scaling_factor=3.0), dict(scaling=3.0)),
        (
            dict(frequency_factors=[1, 1, 2, 3, 5, 8, 13]),
            dict(factors=[1, 1, 2, 3, 5, 8, 13]),
        ),
        (
            dict(rotary_dim=4, frequency_factors=(1.5, 7), scaling_factor=0.5),
            dict(rotary_dim=4, factors=[1.5, 7], scaling=0.5),
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("rows", [1, 3])
def test_formula(options, formula, rows):
    x = cases.noise(3, 5, 2, 14)
    positions = np.arange(5)[None] + np.array([[0], [7], [101]])[:rows]
    layer = RotaryEmbedding(**options)
    got = cases.numpy(layer(x, positions=cases.int32(positions)))
    for row in range(3):
        for t in range(5):
            for head in range(2):
                expected = reference.rotate(
                    np.float64(x[row, t, head]), positions[row % rows, t], **formula
                )
                np.testing.assert_allclose(
                    got[row, t, head], expected, rtol=0, atol=3e-5
                )
    copy = RotaryEmbedding.from_config(layer.get_config())
    assert copy.get_config() == layer.get_config()
    again = cases.numpy(copy(x, positions=cases.int32(positions)))
    np.testing.assert_array_equal(again, got)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_floats_tell_far_positions_apart(dtype):
    """In bfloat16 the positions 1000 and 1001 are one number."""
    layer = RotaryEmbedding(dtype=dtype)
    x = np.ones((1, 2, 1, 6), "float32")
    got = layer(x, positions=cases.int32([[1000, 1001]]))
    assert keras.backend.standardize_dtype(got.dtype) == dtype
    for t, position in enumerate((1000, 1001)):
        expected = reference.rotate(np.ones(6), position)
        np.testing.assert_allclose(
            cases.numpy(got)[0, t, 0], expected, rtol=0, atol=0.01
        )


@pytest.mark.parametrize(
    "options", [dict(), dict(max_wavelength=50, scaling_factor=2.0)]
)
def test_hub_layer_agrees(options):
    keras_hub = pytest.importorskip("keras_hub")
    x = cases.noise(3, 5, 2, 14)
    positions = cases.int32(np.arange(5)[None] + np.array([[0], [7], [101]]))
    ours = RotaryEmbedding(**options)(x, positions=positions)
    theirs = keras_hub.layers.RotaryEmbedding(**options)(x, positions=positions)
    np.testing.assert_allclose(
        cases.numpy(ours), cases.numpy(theirs), rtol=0, atol=3e-5
    )
