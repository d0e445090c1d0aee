"""What a cache does not hold, and where nothing can be written."""

import attention_cases as cases
import keras
import numpy as np
import pytest

B, S = 3, 17


def stepper(layer):
    @cases.compiled
    def step(tokens, cache, index):
        return layer(
            tokens, tokens, cache=cache, cache_update_index=index, use_causal_mask=True
        )

    return step


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_unfilled_slots_are_never_read(layout):
    """Zeros or huge numbers past the fill: the output is the same to the bit."""
    layer, _ = cases.make_kind("grouped")
    x, outputs = cases.noise(B, 5, cases.D), []
    step = stepper(layer)
    for filler in (0.0, cases.GARBAGE, -cases.GARBAGE):
        cache = cases.make_cache(layer, B, S, layout, filler=filler)
        output, cache = step(x, cache, cases.int32([0, 3, 7]))
        outputs.append(cases.numpy(output))
        held = cases.entries(cache)
        for row, index in enumerate([0, 3, 7]):
            assert (held[row, :, :index] == np.float32(filler)).all()
            assert (abs(held[row, :, index : index + 5]) < 100).all()
            assert (held[row, :, index + 5 :] == np.float32(filler)).all()
    # Rows that start past 0 see the filler that the test left before their start.
    np.testing.assert_array_equal(outputs[0][0], outputs[1][0])
    np.testing.assert_array_equal(outputs[0][0], outputs[2][0])


# Index of a write of 5 entries into 17 slots, and the slots that it may change.
WRITES = [
    (12, range(12, 17)),
    (13, range(13, 17)),
    (16, range(16, 17)),
    (17, ()),
    (2**30, ()),
    (2**31 - 1, ()),
    (-1, ()),
    (-4, ()),
    (-(2**31), ()),
]


@pytest.mark.parametrize("capacity", [17, 263])
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_traced_index_past_the_end(layout, capacity):
    layer, _ = cases.make_kind("grouped")
    x, before = cases.noise(B, 5, cases.D), cases.noise(B, capacity, cases.D, seed=1)
    step = stepper(layer)
    _, cache = step(
        before, cases.make_cache(layer, B, capacity, layout), cases.int32(0)
    )
    held = cases.entries(cache)
    beyond = capacity - 17
    for index, slots in WRITES:
        changed = np.zeros(capacity, bool)
        changed[[slot + beyond for slot in slots]] = True
        if 0 <= index <= 17:
            index += beyond
        for given in (index, [5, index, index]):
            if keras.backend.backend() != "jax":
                # Without tracing a bad index is known and raises; ask the cache.
                continue
            output, updated = step(x, cache, cases.int32(given))
            assert np.isfinite(cases.numpy(output)).all()
            now = cases.entries(updated)
            rows = slice(None) if given == index else slice(1, None)
            np.testing.assert_array_equal(
                now[rows, :, ~changed], held[rows, :, ~changed]
            )
            assert (now[rows, :, changed] != held[rows, :, changed]).all()
            if given != index:
                np.testing.assert_array_equal(now[0, :, 10:], held[0, :, 10:])
                assert (now[0, :, 5:10] != held[0, :, 5:10]).all()


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_more_entries_than_slots(layout):
    layer, _ = cases.make_kind("plain")
    cache = cases.make_cache(layer, B, 5, layout, filler=0.0)
    keys = cases.noise(B, 7, 3, 7)
    for index, first, last in ((0, 0, 5), (2, 2, 5), (5, 5, 5), (-3, 5, 5)):
        holder = cache if layout == "head_major" else _dense(cache)
        for given in (index, cases.int32(index), cases.int32([index] * B)):
            updated, _ = holder.update(
                keras.ops.convert_to_tensor(keys),
                keras.ops.convert_to_tensor(keys),
                given,
            )
            held = cases.entries(getattr(updated, "tensor", updated))
            expected = np.zeros((B, 5, 3, 7))
            expected[:, first:last] = keys[:, : last - first]
            np.testing.assert_array_equal(held[:, 0], expected)


def _dense(tensor):
    from keras_kvcache.caches import StaticCache

    return StaticCache.from_dense(tensor, "dense")


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("index", [13, -1, 17, 2**31 - 1])
@pytest.mark.parametrize("kind", ["int", "numpy", "tensor", "per_row"])
def test_known_index_past_the_end(layout, index, kind):
    layer, _ = cases.make_kind("plain")
    cache = cases.make_cache(layer, B, S, layout)
    x = cases.noise(B, 5, cases.D)
    given = {
        "int": lambda: index,
        "numpy": lambda: np.int64(index),
        "tensor": lambda: cases.int32(index),
        "per_row": lambda: cases.int32([0, index, 1]),
    }[kind]()
    with pytest.raises(ValueError) as caught:
        layer(x, x, cache=cache, cache_update_index=given)
    for number in (f"{index}", "T=5", "S=17", "cache_update_index"):
        assert number in str(caught.value)


@pytest.mark.parametrize(
    "dtype", ["int8", "uint8", "int16", "int32", "uint32", "int64"]
)
def test_any_integer_is_an_index(dtype):
    layer, _ = cases.make_kind("plain")
    x = cases.noise(B, 1, cases.D)
    cache = cases.make_cache(layer, B, 263, "dense")
    step = stepper(layer)
    _, expected = step(x, cache, cases.int32(3))
    for index in (np.array(3, dtype), np.array([3, 3, 3], dtype)):
        _, got = step(x, cache, keras.ops.convert_to_tensor(index))
        np.testing.assert_array_equal(cases.entries(got), cases.entries(expected))


@pytest.mark.jax_only
def test_eager_decoding_compiles_once():
    """An index in an array is not part of any program, however it is called."""
    import jax

    compilations = []

    def listen(event, duration, **_):
        if "backend_compile" in event:
            compilations.append(event)

    layer, _ = cases.make_kind("grouped")
    cache = cases.make_cache(layer, B, S, "head_major")
    x = cases.noise(B, 1, cases.D)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for index in range(3):
            for given in (cases.int32(index), cases.int32([index] * B), index):
                _, cache = layer(x, x, cache=cache, cache_update_index=given)
            if index == 0:
                assert compilations
                compilations.clear()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not compilations
