"""Rotary position embedding (Su et al., 2021, https://arxiv.org/abs/2104.09864)."""

import math
from typing import Any

import numpy as np
from keras import ops

from keras_kvcache.attention.products import sum_dtype
from keras_kvcache.attention.trigonometry import cos, sin


def inverse_frequencies(
    rotary_dim: int, max_wavelength: float, frequency_factors: Any = None
) -> np.ndarray:
    """The angle per position of each rotated pair, in radians.

    Args:
        rotary_dim: How many components are rotated; even.
        max_wavelength: The base of the geometric progression.
        frequency_factors: `rotary_dim // 2` numbers that divide the frequencies
            (Llama 3's long-context scaling comes as such a list), or `None`.

    Returns:
        A NumPy array of shape `(rotary_dim // 2,)`, float64: an error in a
        frequency comes out multiplied by the position.
    """
    inverse = float(max_wavelength) ** (-np.arange(0, rotary_dim, 2) / rotary_dim)
    return inverse if frequency_factors is None else inverse / frequency_factors


def llama3_frequency_factors(
    rotary_dim: int,
    max_wavelength: float,
    adjustment_factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    pretraining_sequence_length: int,
) -> list[float]:
    """Divisors of the rotary frequencies, as Llama 3.1 and later have them.

    Pairs that turn often within the pretraining length stay as they are, those that
    turn seldom are slowed down, and between the two it's interpolated (Dubey et al.,
    2024, https://arxiv.org/abs/2407.21783).

    Args:
        rotary_dim: How many components are rotated; even.
        max_wavelength: Base of the frequencies.
        adjustment_factor: What the slow pairs are divided by.
        low_freq_factor: Pairs of fewer turns are slow.
        high_freq_factor: Pairs of more turns stay.
        pretraining_sequence_length: The length within which turns are counted.

    Returns:
        A list of `rotary_dim // 2` floats.
    """
    frequencies = inverse_frequencies(rotary_dim, max_wavelength)
    turns = pretraining_sequence_length * frequencies / (2 * math.pi)
    keep = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
    keep = np.clip(keep, 0.0, 1.0)
    return (1.0 / (keep + (1.0 - keep) / adjustment_factor)).tolist()


def rotate(inputs: Any, positions: Any, inverse_frequencies: Any) -> Any:
    """Rotates each pair of components by an angle proportional to the position.

    Component `j` of the first half of the rotated part is paired with component
    `j` of its second half. Components past the rotated part stay as they are.

    Args:
        inputs: Tensor `(B, T, heads, H)`.
        positions: Tensor `(1 | B, T)`, one position a token.
        inverse_frequencies: Floats `(rotary_dim // 2,)`, `rotary_dim <= H`.

    Returns:
        A tensor like `inputs`. The angles are computed in float32 at least, since
        bfloat16 can't tell positions past 256 apart.
    """
    half, dtype = inverse_frequencies.shape[0], sum_dtype(inputs)
    frequencies = ops.convert_to_tensor(inverse_frequencies, dtype)
    angle = ops.cast(positions, dtype)[:, :, None, None] * frequencies
    cosine, sine = cos(angle), sin(angle)
    x = ops.cast(inputs, dtype)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    turned = [first * cosine - second * sine, second * cosine + first * sine, rest]
    return ops.cast(ops.concatenate(turned, axis=-1), inputs.dtype)
