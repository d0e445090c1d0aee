"""Rings against a list in which each position is written to its slot in turn."""

import attention_cases as cases
import keras
import numpy as np
import pytest

from keras_kvcache.attention.ring import ring_positions, write_ring

B, K, H = 3, 2, 5

positions_of = cases.compiled(
    lambda fill: [ring_positions(fill, ring) for ring in (1, 7, 11)]
)


def held(fill, ring):
    """Which position each slot holds, -1 for none."""
    slots = [-1] * ring
    for position in range(fill):
        slots[position % ring] = position
    return slots


@pytest.mark.parametrize("fill", [[0, 1, 6], [7, 8, 13], [14, 22, 1009], [5]])
def test_slots_hold_the_latest_position(fill):
    got = map(cases.numpy, positions_of(cases.int32(fill)))
    for ring, positions in zip((1, 7, 11), got, strict=True):
        expected = [held(number, ring) for number in fill]
        np.testing.assert_array_equal(np.maximum(positions, -1), expected)


@pytest.mark.parametrize("first, count", [(0, 3), (3, 4), (6, 1), (3, None)])
def test_part_of_a_ring(first, count):
    fill = cases.int32([0, 5, 19])
    part = cases.numpy(ring_positions(fill, 7, first, count))
    whole = cases.numpy(ring_positions(fill, 7))
    np.testing.assert_array_equal(part, whole[:, first:][:, :count])


# Shape of a ring of 7 slots, and the axis of these.
LAYOUTS = {"dense": ((B, 2, 7, K, H), 2), "keys": ((B, K, H, 7), 3)}

write = {
    (first, axis): cases.compiled(
        lambda buffer, update, start, end, first=first, axis=axis: write_ring(
            buffer, update, start, end, 7, first, axis
        )
    )
    for first in (0, 3)
    for axis in (2, 3)
}


@pytest.mark.parametrize("length", [1, 4, 17])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_entries_go_to_the_slots_of_their_positions(layout, length):
    """Whole rings and the part from slot 3 on; fewer entries than slots and more."""
    shape, axis = LAYOUTS[layout]
    ring = cases.noise(*shape)
    update = cases.noise(*shape[:axis], length, *shape[axis + 1 :], seed=1)
    starts = ([0, 5, 6], [13, 0, 103], [2], [-4, 9, -1])
    brought = ([length], [0], [1, 0, length], [length - 1])
    for first in (0, 3):
        buffer = np.take(ring, range(first, 7), axis)
        for start in starts:
            for number in brought:
                end = np.add(start, number)
                got = write[first, axis](
                    buffer,
                    update,
                    cases.int32(np.broadcast_to(start, end.shape)),
                    cases.int32(end),
                )
                expected = buffer.copy()
                slots, entries = (np.moveaxis(x, axis, 1) for x in (expected, update))
                for row in range(B):
                    begin, stop = (np.resize(x, B)[row] for x in (start, end))
                    for position in range(begin, stop):
                        slot = position % 7 - first
                        if slot >= 0:
                            slots[row, slot] = entries[row, position - begin]
                np.testing.assert_array_equal(cases.numpy(got), expected)


@pytest.mark.parametrize("dtype", ["int8", "bfloat16", "float32"])
def test_ring_keeps_its_dtype(dtype):
    buffer = keras.ops.zeros((1, 7, 3), dtype)
    update = keras.ops.ones((1, 2, 3), "float32")
    start = cases.int32([6])
    got = write_ring(buffer, update, start, start + 2, 7, 0, 1)
    assert keras.backend.standardize_dtype(got.dtype) == dtype
    assert cases.numpy(got)[0, :, 0].tolist() == [1, 0, 0, 0, 0, 0, 1]
