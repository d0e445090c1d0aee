"""Quantized tensors to float32, in the layout Keras wants.

A checkpoint stores a projection as `(outputs, inputs)`; a Keras kernel is
`(inputs, outputs)`. For the common block formats the bytes are transposed
before they are widened, which moves a quarter of the memory or less and writes
every float once, in its final place.
"""

from __future__ import annotations

from typing import Any

import numpy as np

# Rows widened at a time, so that the temporaries of a large tensor stay small.
_ROWS = 256


def dequantize(rows: np.ndarray, quantization: Any) -> np.ndarray:
    """Widens quantized rows.

    Args:
        rows: uint8 `(rows, bytes per row)`, as stored.
        quantization: The `gguf.GGMLQuantizationType` they are stored in.

    Returns:
        float32 `(rows, columns)`.
    """
    from gguf import quants

    parts = [
        quants.dequantize(rows[start : start + _ROWS], quantization)
        for start in range(0, len(rows), _ROWS)
    ]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def dequantize_transposed(rows: np.ndarray, quantization: Any) -> np.ndarray:
    """Widens quantized rows and transposes: float32 `(columns, rows)`.

    Args:
        rows: uint8 `(rows, bytes per row)`, as stored.
        quantization: The `gguf.GGMLQuantizationType` they are stored in.
    """
    layout = _BLOCKS.get(quantization.name)
    if layout is None:
        return np.ascontiguousarray(dequantize(rows, quantization).T)
    num_factors, codes_of = layout
    block_bytes = 2 * num_factors + (32 if codes_of is _bytes else 16)
    num_rows, num_blocks = len(rows), rows.shape[1] // block_bytes
    blocks = rows.reshape(num_rows, num_blocks, block_bytes)
    # (factors, blocks, rows): the scale, and the offset of the formats with one.
    factors = np.ascontiguousarray(blocks[:, :, : 2 * num_factors]).view("<f2")
    factors = np.ascontiguousarray(factors.transpose(2, 1, 0), dtype=np.float32)
    packed = np.ascontiguousarray(rows.T).reshape(num_blocks, block_bytes, num_rows)
    out = np.empty((num_blocks, 32, num_rows), np.float32)
    for index in range(num_blocks):
        codes = codes_of(packed[index, 2 * num_factors :])
        np.multiply(codes, factors[0, index], out=out[index])
        if num_factors == 2:
            out[index] += factors[1, index]
    return out.reshape(num_blocks * 32, num_rows)


def _bytes(packed: np.ndarray) -> np.ndarray:
    return packed.view(np.int8)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """The low halves of the 16 bytes of a block, then the high ones."""
    return np.concatenate([packed & 15, packed >> 4])


def _signed_nibbles(packed: np.ndarray) -> np.ndarray:
    return _nibbles(packed).view(np.int8) - np.int8(8)


# Blocks of 32 values each: how many float16 factors precede the codes (a scale,
# or a scale and an offset), and how the codes are read.
_BLOCKS = {
    "Q8_0": (1, _bytes),
    "Q4_0": (1, _signed_nibbles),
    "Q4_1": (2, _nibbles),
}
