"""Numbers of 8 and 4 bits for keys and values.

Keys differ most between channels, some of which are large in every token; values
differ most between tokens. So int4 gives keys a range for each channel over a group of
tokens, and values one for each token (KIVI, Liu et al., 2024,
https://arxiv.org/abs/2402.02750). Values are rotated before, which spreads what is
large over all channels (QuaRot, Ashkboos et al., 2024,
https://arxiv.org/abs/2404.00456; TurboQuant, Zandieh et al., 2025,
https://arxiv.org/abs/2504.19874). With SmolLM2 that loses as little as plain values do,
but rotated keys with a range for each token lose several times as much
(`tests/test_codec_quality.py`). 8 bits need no such care.
"""

import functools
from typing import Any

import numpy as np
from keras import ops

# The largest code of 8 bits; -128 isn't used, so that codes are symmetric.
LARGEST = 127.0
# Half of the distance, in steps, between the outermost of 16 levels.
HALF_RANGE = 7.5


def quantize_int8(x: Any, axis: int) -> tuple[Any, Any]:
    """Quantizes to 8 bits with one scale for all entries of an axis.

    Args:
        x: Float tensor.
        axis: The axis that shares a scale, positive.

    Returns:
        `(codes, scale)` with `x ≈ codes · scale`: int8 of the shape of `x`, and
        float32 with 1 in the place of `axis`.
    """
    x = ops.cast(x, "float32")
    scale = ops.max(ops.abs(x), axis=axis, keepdims=True) / LARGEST
    codes = ops.clip(ops.round(x / _not_zero(scale)), -LARGEST, LARGEST)
    return ops.cast(codes, "int8"), scale


def quantize_int4(x: Any, axis: int) -> tuple[Any, Any]:
    """Quantizes to 4 bits with one scale for all entries of an axis.

    Args:
        x: Float tensor.
        axis: The axis that shares a scale, positive.

    Returns:
        `(codes, scale)` with `x ≈ (codes - 7.5) · scale`: uint8 from 0 to 15, of the
        shape of `x`, and bfloat16 with 1 in the place of `axis`.
    """
    x = ops.cast(x, "float32")
    scale = ops.max(ops.abs(x), axis=axis, keepdims=True) / HALF_RANGE
    scale = ops.cast(scale, "bfloat16")
    steps = x / _not_zero(ops.cast(scale, "float32"))
    codes = ops.clip(ops.floor(steps) + 8.0, 0.0, 15.0)
    return ops.cast(codes, "uint8"), scale


def quantize_int4_groups(x: Any, axis: int, group: int) -> tuple[Any, Any, Any]:
    """Quantizes to 4 bits with a scale and a lowest value for each group on an axis.

    Args:
        x: Float tensor with a multiple of `group` on `axis`.
        axis: The axis that is cut into groups, positive.
        group: How many entries each has.

    Returns:
        `(codes, scale, lowest)` with `x ≈ codes · scale + lowest` group by group:
        uint8 from 0 to 15, of the shape of `x`, and twice bfloat16 with one
        entry a group on `axis`.
    """
    shape = ops.shape(x)
    groups = shape[axis] // group
    x = ops.cast(x, "float32")
    x = ops.reshape(x, (*shape[:axis], groups, group, *shape[axis + 1 :]))
    lowest = ops.min(x, axis=axis + 1, keepdims=True)
    # Rounded down, so that no value lies below.
    lowest = ops.cast(lowest - ops.abs(lowest) / 256.0, "bfloat16")
    above = x - ops.cast(lowest, "float32")
    scale = ops.max(above, axis=axis + 1, keepdims=True) / (2.0 * HALF_RANGE)
    scale = ops.cast(scale, "bfloat16")
    codes = ops.round(above / _not_zero(ops.cast(scale, "float32")))
    codes = ops.reshape(ops.cast(ops.clip(codes, 0.0, 15.0), "uint8"), shape)
    return codes, ops.squeeze(scale, axis + 1), ops.squeeze(lowest, axis + 1)


def dequantize_int4_groups(
    codes: Any, scale: Any, lowest: Any, axis: int, group: int, dtype: str
) -> Any:
    """The inverse of `quantize_int4_groups`, up to rounding."""
    # The sum of two numbers of which each may be beyond float16, as it was rounded.
    wide = "float32" if dtype == "float16" else dtype
    scale = ops.repeat(ops.cast(scale, wide), group, axis=axis)
    lowest = ops.repeat(ops.cast(lowest, wide), group, axis=axis)
    values = ops.cast(codes, wide) * scale + lowest
    if dtype == "float16":
        values = ops.cast(ops.clip(values, -65504.0, 65504.0), dtype)
    return values


@functools.cache
def rotation(size: int) -> np.ndarray:
    """An orthogonal matrix that spreads a large channel over all channels.

    A cosine transform of channels with arbitrary but fixed signs: like a Hadamard
    matrix, but of any size, and the same on every machine.

    Args:
        size: `H`.

    Returns:
        A float32 NumPy array `(H, H)`.
    """
    wave, channel = np.mgrid[:size, :size]
    cosines = np.cos(np.pi * (channel + 0.5) * wave / size)
    cosines *= np.where(wave == 0, 1.0, np.sqrt(2.0)) / np.sqrt(size)
    # Signs by a quadratic sequence, which correlates with no wave.
    signs = np.where(np.arange(size) ** 2 * np.sqrt(2.0) % 1 < 0.5, -1.0, 1.0)
    return (cosines * signs).T.astype("float32")


def pack_int4(codes: Any, axis: int) -> Any:
    """Packs two codes into a byte: entry `j` of an axis with entry `j + half`."""
    size = codes.shape[axis]
    half = -(-size // 2)
    low, high = ops.split(_pad_one(codes, axis) if size % 2 else codes, [half], axis)
    return ops.bitwise_or(low, ops.left_shift(high, 4))


def unpack_int4(packed: Any, axis: int, size: int) -> Any:
    """Unpacks the `size` codes that `pack_int4` packed."""
    low, high = ops.bitwise_and(packed, 15), ops.right_shift(packed, 4)
    codes = ops.concatenate([low, high], axis=axis)
    return codes if size % 2 == 0 else ops.split(codes, [size], axis)[0]


def _pad_one(x, axis):
    widths = [[0, 0] for _ in x.shape]
    widths[axis][1] = 1
    return ops.pad(x, widths)


def _not_zero(scale):
    return ops.where(scale > 0, scale, ops.ones_like(scale))
