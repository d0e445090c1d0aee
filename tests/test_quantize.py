"""Codes of 8 and 4 bits: what comes back is as near as their scale says."""

import attention_cases as cases
import keras
import numpy as np
import pytest
import reference_codecs

from keras_kvcache.attention.quantize import (
    dequantize_int4_groups,
    pack_int4,
    quantize_int4,
    quantize_int4_groups,
    quantize_int8,
    rotation,
    unpack_int4,
)

B, S, K, H = 3, 15, 2, 7
GROUP = 5
FLOAT32 = 2.0**-23  # the distance of 1 to the next number
BFLOAT16 = 2.0**-7


def data(name):
    """Tensors `(B, S, K, H)` that are hard on a codec, each in its way."""
    x = cases.noise(B, S, K, H)
    channel = np.arange(H, dtype="float32")
    return {
        "normal": x,
        "zeros": np.zeros_like(x),
        "a zero vector": x * (np.arange(S)[:, None, None] != 3),
        "constant": np.full_like(x, -0.3),
        "constant channels": np.broadcast_to(channel - 3, x.shape),
        "huge": x * np.float32(1e30),
        "as large as can be": np.sign(x) * np.float32(1e36),
        "tiny": x * np.float32(1e-30),
        "mixed in a vector": x * 10 ** (3 * channel - 9),
        "mixed in time": x * 10 ** np.arange(-7, 8, dtype="float32")[:, None, None],
        "an outlier": x + 1e4 * (channel == 2),
        "one sign": abs(x) + 5,
    }[name].astype("float32")


DATA = (
    "normal",
    "zeros",
    "a zero vector",
    "constant",
    "constant channels",
    "huge",
    "as large as can be",
    "tiny",
    "mixed in a vector",
    "mixed in time",
    "an outlier",
    "one sign",
)


def bfloat16(tensor):
    assert keras.backend.standardize_dtype(tensor.dtype) == "bfloat16"
    return cases.numpy(tensor)


int8 = cases.compiled(lambda x: quantize_int8(x, 3))
int4 = cases.compiled(lambda x: quantize_int4(x, 3))


@cases.compiled
def int4_groups(x):
    codes, scale, lowest = quantize_int4_groups(x, 1, GROUP)
    back = dequantize_int4_groups(codes, scale, lowest, 1, GROUP, "float32")
    return codes, scale, lowest, back


@pytest.mark.parametrize("name", DATA)
def test_int8_is_within_half_a_step(name):
    """The step is the largest number of a token and head, over 127."""
    x = data(name)
    codes, scale = map(cases.numpy, int8(x))
    assert codes.dtype == np.int8 and scale.shape == (B, S, K, 1)
    assert codes.min() >= -127
    largest = abs(np.float64(x)).max(axis=-1, keepdims=True)
    np.testing.assert_allclose(scale, largest / 127, rtol=2 * FLOAT32)
    error = abs(codes * scale - x)
    assert (error <= scale / 2 + 2 * FLOAT32 * largest).all()
    expected = reference_codecs.int8(x)
    np.testing.assert_allclose(codes * scale, expected, rtol=2 * FLOAT32, atol=0)


@pytest.mark.parametrize("name", DATA)
def test_int4_is_within_half_a_step(name):
    """Of 16 levels around zero, the outermost 7.5 steps from it."""
    x = data(name)
    codes, scale = int4(x)
    codes, scale = cases.numpy(codes), bfloat16(scale)
    assert codes.dtype == np.uint8 and scale.shape == (B, S, K, 1)
    assert codes.max() <= 15
    largest = abs(np.float64(x)).max(axis=-1, keepdims=True)
    np.testing.assert_allclose(scale, largest / 7.5, rtol=BFLOAT16 / 2)
    back = (codes - 7.5) * scale
    # Where the scale was rounded down, the largest lies a bit outside.
    assert (abs(back - x) <= scale / 2 + BFLOAT16 / 2 * largest).all()
    inside = abs(x) <= 7.5 * scale
    assert (abs(back - x) <= scale / 2 * (1 + 16 * FLOAT32))[inside].all()
    np.testing.assert_array_equal(back, reference_codecs.int4(x))


@pytest.mark.parametrize("name", DATA)
def test_int4_in_groups_is_within_half_a_step(name):
    """Of 16 levels over the range of a channel in a group of tokens."""
    x = data(name)
    codes, scale, lowest, back = int4_groups(x)
    codes, back = cases.numpy(codes), cases.numpy(back)
    assert codes.dtype == np.uint8 and codes.shape == x.shape
    assert codes.max() <= 15
    groups = np.float64(x).reshape(B, S // GROUP, GROUP, K, H)
    scale, lowest = bfloat16(scale), bfloat16(lowest)
    assert scale.shape == lowest.shape == (B, S // GROUP, K, H)
    least, most = groups.min(axis=2), groups.max(axis=2)
    # The lowest level lies at most so far below, and never above.
    assert (lowest <= least).all()
    assert (lowest >= least - (1 / 256 + BFLOAT16 / 2) * abs(least) * 1.01).all()
    np.testing.assert_allclose(scale, (most - lowest) / 15, rtol=BFLOAT16 / 2 * 1.01)
    step, size = (np.repeat(y, GROUP, axis=1) for y in (scale, abs(lowest) + most))
    assert (abs(back - x) <= step / 2 + 4 * FLOAT32 * abs(size)).all()
    for row, number in np.ndindex(B, S // GROUP):
        tokens = slice(GROUP * number, GROUP * (number + 1))
        expected = reference_codecs.int4_of_group(x[row, tokens])
        np.testing.assert_array_equal(back[row, tokens], expected)


def test_constants_survive():
    """Where all are equal nothing is lost but what bfloat16 loses of a difference."""
    constant = data("constant")
    codes, scale = map(cases.numpy, int8(constant))
    np.testing.assert_allclose(codes * scale, constant, rtol=2 * FLOAT32)
    codes, scale = map(cases.numpy, int4(constant))
    np.testing.assert_allclose((codes - 7.5) * scale, constant, rtol=BFLOAT16 / 2)
    for name in ("zeros", "constant", "constant channels"):
        back = cases.numpy(int4_groups(data(name))[3])
        np.testing.assert_allclose(back, data(name), rtol=BFLOAT16**2)


@pytest.mark.parametrize("function", [int8, int4, int4_groups])
def test_zeros_come_back_as_zeros(function):
    codes, scale, *more = map(cases.numpy, function(data("zeros")))
    assert not scale.any()
    for lowest_or_back in more:
        assert not lowest_or_back.any()


@pytest.mark.parametrize("size", [1, 2, 7, 64, 80])
def test_rotation_spreads_what_is_large(size):
    """It's orthogonal, and of one channel it makes a bit of each."""
    turn = rotation(size).astype("float64")
    np.testing.assert_allclose(turn @ turn.T, np.eye(size), rtol=0, atol=1e-6)
    assert abs(turn).max() <= (2 / size) ** 0.5 + 1e-6
    # As of what lies in all channels alike, or with changing signs.
    for wave in (np.ones(size), (-1.0) ** np.arange(size)):
        largest = abs(wave @ turn).max() / np.linalg.norm(wave)
        assert size < 16 or largest < 0.5


@pytest.mark.parametrize("axis", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_two_codes_a_byte(size, axis):
    shape = [3, 2, 2, 2]
    shape[axis] = size
    codes = np.random.default_rng(size).integers(0, 16, shape).astype("uint8")
    packed = pack_int4(keras.ops.convert_to_tensor(codes), axis)
    shape[axis] = -(-size // 2)
    assert tuple(packed.shape) == tuple(shape)
    assert keras.backend.standardize_dtype(packed.dtype) == "uint8"
    unpacked = cases.numpy(unpack_int4(packed, axis, size))
    np.testing.assert_array_equal(unpacked, codes)
    # Any byte is two codes, whatever was in a slot that nobody wrote.
    every_byte = np.arange(256, dtype="uint8").reshape(1, 256)
    unpacked = cases.numpy(unpack_int4(keras.ops.convert_to_tensor(every_byte), 1, 512))
    assert unpacked.max() == 15
    assert len({*zip(unpacked[0, :256], unpacked[0, 256:], strict=True)}) == 256
