"""`splice` against a loop over rows and entries."""

import sys

import attention_cases as cases
import jax
import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_kvcache.attention import splice
from keras_kvcache.attention.positions import write_slot
from keras_kvcache.attention.splicing import STRATEGIES, choose_strategy


def spliced(buffer, update, index, axis=2):
    """The same, one entry at a time."""
    result = buffer.copy()
    slots, entries = np.moveaxis(result, axis, 1), np.moveaxis(update, axis, 1)
    for row, first in enumerate(np.broadcast_to(index, len(buffer))):
        for t in range(entries.shape[1]):
            if 0 <= first + t < slots.shape[1]:
                slots[row, first + t] = entries[row, t]
    return result


# Shapes, and the axis of their slots.
SHAPES = {
    "dense": ((3, 2, 11, 5, 7), 2),
    "values": ((3, 5, 11, 7), 2),
    "wide values": ((3, 2, 11, 131), 2),
    "keys": ((3, 5, 7, 11), 3),
}


@pytest.mark.parametrize("length", [1, 4, 11, 13])
@pytest.mark.parametrize("layout", SHAPES)
def test_every_place(layout, length):
    shape, axis = SHAPES[layout]
    buffer, update = cases.noise(*shape), cases.noise(*shape, seed=1)
    update = np.concatenate([update, update + 9], axis=axis)
    update = np.take(update, range(length), axis=axis)
    tensors = keras.ops.convert_to_tensor(buffer), keras.ops.convert_to_tensor(update)

    def splice_(*arguments):
        return splice(*arguments, axis=axis)

    traced = cases.compiled(splice_)
    for index in range(-14, 15):
        expected = spliced(buffer, update, index, axis)
        got = traced(*tensors, cases.int32(index))
        np.testing.assert_array_equal(cases.numpy(got), expected)
        got = splice_(*tensors, index)
        np.testing.assert_array_equal(cases.numpy(got), expected)
    for first in range(-14, 15, 3):
        index = [first, first + 1, 5]
        got = traced(*tensors, cases.int32(index))
        expected = spliced(buffer, update, index, axis)
        np.testing.assert_array_equal(cases.numpy(got), expected)


# Of strategies that are for one backend alone.
BACKENDS = dict(scatter="jax", loop="jax", gather="torch")


@pytest.mark.parametrize("length", [1, 4, 13])
@pytest.mark.parametrize("layout", SHAPES)
def test_strategies_are_equal(layout, length):
    """Whichever way suits the platform, the same entries get to the same slots."""
    shape, axis = SHAPES[layout]
    buffer, update = cases.noise(*shape), cases.noise(*shape, seed=1)
    update = np.take(np.concatenate([update, update + 9], axis), range(length), axis)
    tensors = [keras.ops.convert_to_tensor(array) for array in (buffer, update)]
    for name, strategy in STRATEGIES.items():
        if BACKENDS.get(name, keras.backend.backend()) != keras.backend.backend():
            continue
        for index in ([-3], [0], [9], [11], [-2, 5, 10], [-13, 11, 40]):
            if name == "slice" and len(index) > 1:
                continue  # It is about one index for all rows.
            got = strategy(*tensors, cases.int32(index), axis)
            expected = spliced(buffer, update, index, axis)
            np.testing.assert_array_equal(cases.numpy(got), expected)


@pytest.mark.jax_only
@pytest.mark.parametrize("strategy", sorted({*STRATEGIES} - {"gather"}))
def test_places_are_of_one_dtype(strategy):
    """Where JAX computes in 64 bits, too."""
    shape, axis = SHAPES["keys"]
    buffer, update = cases.noise(*shape), cases.noise(3, 5, 7, 4, seed=1)
    index = np.array([9], "int32")
    jax.config.update("jax_enable_x64", True)
    try:
        splice_ = jax.jit(STRATEGIES[strategy], static_argnums=3)
        got = cases.numpy(splice_(buffer, update, index, axis))
    finally:
        jax.config.update("jax_enable_x64", False)
    np.testing.assert_array_equal(got, spliced(buffer, update, index, axis))


@pytest.mark.jax_only
@pytest.mark.parametrize("index", [[4], [-2, 5, 10]])
@pytest.mark.parametrize("layout", ["values", "wide values", "keys"])
def test_a_loop_has_gradients(layout, index):
    shape, axis = SHAPES[layout]
    buffer, update = cases.noise(*shape), cases.noise(*shape, seed=1)
    weights = cases.noise(*shape, seed=2)

    def loss(strategy, buffer, update):
        spliced = STRATEGIES[strategy](buffer, update, cases.int32(index), axis)
        return (weights * spliced**2).sum()

    gradients = jax.grad(loss, argnums=(1, 2))
    looped, passed = (gradients(name, buffer, update) for name in ("loop", "where"))
    assert all(abs(gradient).max() > 0.1 for gradient in looped)
    jax.tree.map(np.testing.assert_array_equal, looped, passed)


KEYS = (3, 5, 7, 11), 3
DENSE = (3, 2, 11, 5, 7), 2


def test_strategy_by_platform(monkeypatch):
    backend = keras.backend.backend()
    scatter = {"jax": "scatter", "torch": "gather"}.get(backend, "where")
    for place in (KEYS, DENSE):
        shared = "gather" if backend == "torch" else "slice"
        assert choose_strategy(True, True, *place) == shared
        assert choose_strategy(False, True, *place) == scatter
        assert choose_strategy(True, False, *place) == "where"
    # The function `splice` hides its module of the same name.
    module = sys.modules[choose_strategy.__module__]
    monkeypatch.setattr(module, "rows_divide", lambda rows: rows % 2 == 0)
    alone = "gather" if backend == "torch" else "where"
    assert choose_strategy(False, True, *KEYS) == alone
    assert choose_strategy(False, True, (4, 5, 7, 11), 3) == scatter


@pytest.mark.jax_only
def test_strategy_on_a_tpu(on_tpu, monkeypatch):
    for is_one_index in (True, False):
        assert choose_strategy(is_one_index, True, *KEYS) == "loop"
        assert choose_strategy(is_one_index, False, *KEYS) == "where"
    assert choose_strategy(True, True, *DENSE) == "slice"
    assert choose_strategy(False, True, *DENSE) == "where"
    for shape in ((3,), (3, 5), (3, 131)):  # of rows, into which one is put
        assert choose_strategy(True, True, shape, 0) == "slice"
    monkeypatch.setattr(keras.distribution, "distribution", lambda: "spread")
    assert choose_strategy(True, True, *KEYS) == "slice"


_compiled_splice = cases.compiled(splice)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=3, max_size=3))
def test_no_index_is_too_far(index):
    buffer, update = cases.noise(3, 5, 11, 7), cases.noise(3, 5, 4, 7, seed=1)
    got = _compiled_splice(buffer, update, cases.int32(np.array(index)))
    np.testing.assert_array_equal(cases.numpy(got), spliced(buffer, update, index))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_buffer_keeps_its_dtype(dtype):
    buffer = keras.ops.zeros((1, 2, 5, 3), dtype)
    update = keras.ops.ones((1, 2, 1, 3), "float32")
    for index in (2, cases.int32(2), cases.int32([2])):
        got = splice(buffer, update, index)
        assert keras.backend.standardize_dtype(got.dtype) == dtype
        assert cases.numpy(got)[:, :, 2].all() and cases.numpy(got).sum() == 6


@pytest.mark.parametrize(
    "index, slot", [(0, 0), (7, 7), (11, 11), (99, 99), (-1, 11), (-99, 11)]
)
def test_slot_to_write(index, slot):
    assert write_slot(index, 11) == slot
    assert cases.numpy(write_slot(cases.int32([index, 3]), 11)).tolist() == [slot, 3]
