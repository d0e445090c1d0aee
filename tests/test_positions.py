"""Indices and the positions that follow from them."""

import attention_cases as cases
import keras
import numpy as np
import pytest

from keras_kvcache.attention import normalize_index, token_positions
from keras_kvcache.attention.positions import FAR, as_int32
from keras_kvcache.runtime.concrete import concrete_value


@pytest.mark.parametrize(
    "dtype", ["int8", "uint8", "int16", "int32", "uint32", "int64"]
)
def test_positions(dtype):
    for index, expected in ((3, [[3, 4]]), ([5, 0, 7], [[5, 6], [0, 1], [7, 8]])):
        given = keras.ops.convert_to_tensor(np.array(index, dtype))
        got = token_positions(given, 2)
        assert keras.backend.standardize_dtype(got.dtype) == "int32"
        assert cases.numpy(got).tolist() == expected
    assert cases.numpy(token_positions(3, 2)).tolist() == [[3, 4]]


@pytest.mark.skipif(
    keras.backend.backend() == "jax", reason="JAX has no int64 unless told so"
)
def test_what_int32_cannot_hold_does_not_wrap():
    index = keras.ops.convert_to_tensor(np.array([2**32, 2**40 + 5, -(2**40), 7]))
    assert cases.numpy(as_int32(index)).tolist() == [FAR, FAR, -1, 7]


def test_unsigned_index_does_not_become_negative():
    index = keras.ops.convert_to_tensor(np.array([2**32 - 1, 5], "uint32"))
    assert cases.numpy(as_int32(index)).tolist() == [FAR, 5]


@pytest.mark.parametrize("capacity", [17, None])
def test_index_that_fits(capacity):
    assert normalize_index(12, 3, 5, capacity) == 12
    assert normalize_index(np.int64(12), 3, 5, capacity) == 12
    for index in ([12, 0, 7], 12):
        got = normalize_index(cases.int32(index), 3, 5, capacity)
        assert cases.numpy(got).tolist() == index


def test_index_of_unknown_sizes():
    """Nothing can be said of what a symbolic call doesn't know."""
    index = keras.KerasTensor((None,), "int32")
    assert normalize_index(index, 3, None, 17).shape == (None,)
    assert normalize_index(99, None, None, 17) == 99


@pytest.mark.parametrize("index", [13, 2**31 - 1, 2**70, -1])
def test_index_that_does_not_fit(index):
    with pytest.raises(ValueError, match=f"index={index}, T=5, S=17"):
        normalize_index(index, 3, 5, 17)


@pytest.mark.parametrize("index", [True, 1.0, "3", np.bool_(True), np.float32(3)])
def test_index_of_another_type(index):
    with pytest.raises(TypeError, match="`cache_update_index` must be an integer"):
        normalize_index(index, 3, 5, 17)


def test_known_values():
    assert concrete_value(3) == 3
    assert concrete_value(np.array([1, 2])).tolist() == [1, 2]
    assert concrete_value(cases.int32([1, 2])).tolist() == [1, 2]
    assert concrete_value(keras.KerasTensor((2,), "int32")) is None


@pytest.mark.jax_only
def test_traced_values_are_unknown():
    import jax

    seen = []
    jax.jit(lambda x: seen.append(concrete_value(x)))(3)
    jax.vmap(lambda x: seen.append(concrete_value(x)))(np.arange(3))
    assert seen == [None, None]
