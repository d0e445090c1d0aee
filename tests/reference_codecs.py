"""What entries come back as from the codecs, in NumPy."""

import jax.numpy as jnp
import numpy as np
import scipy.fft


def bfloat16(x):
    return x.astype(jnp.bfloat16).astype("float32")


def int8(x):
    scale = np.abs(x).max(axis=-1, keepdims=True) * np.float32(1 / 127)
    return np.round(x / np.where(scale > 0, scale, 1)) * scale


def rotation(size):
    """The cosine transform of each unit vector, with the sign of its channel."""
    signs = [-1.0 if channel**2 * 2**0.5 % 1 < 0.5 else 1.0 for channel in range(size)]
    return scipy.fft.dct(np.diag(signs), norm="ortho").astype("float32")


def int4(x):
    scale = bfloat16(np.abs(x).max(axis=-1, keepdims=True) * np.float32(1 / 7.5))
    return (np.floor(x / np.where(scale > 0, scale, 1)).clip(-8, 7) + 0.5) * scale


def int4_steps(keys):
    """Keys of a group in steps from the lowest, which codes round; step; lowest."""
    lowest = bfloat16(keys.min(0) - np.abs(keys.min(0)) * np.float32(1 / 256))
    scale = bfloat16((keys - lowest).max(axis=0) * np.float32(1 / 15))
    return (keys - lowest) / np.where(scale > 0, scale, 1), scale, lowest


def int4_of_group(keys):
    steps, scale, lowest = int4_steps(keys)
    return np.round(steps) * scale + lowest
