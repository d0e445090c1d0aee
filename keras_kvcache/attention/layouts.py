"""Layouts: the order of the axes of keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from keras_kvcache.attention.codecs import Codec, CodedArray


class Axes(NamedTuple):
    """Axes of an array, counted from the front.

    Attributes:
        size: Axis of the head size.
        slots: Axis of the slots.
    """

    size: int
    slots: int


@dataclass(frozen=True)
class Layout:
    """The order of the axes of coded keys and values; rows are on axis 0.

    Attributes:
        name: Its name, in messages.
        heads: Axis of the heads; of a dense layout from the end.
        keys, values: `Axes` of the arrays of keys and of values.
        is_one_tensor: Whether one tensor has keys and values, at 0 and 1 of axis 1.
    """

    name: str
    heads: int
    keys: Axes
    values: Axes
    is_one_tensor: bool = False

    def arrays(
        self, codec: Codec, head_dim: int, value_dim: int
    ) -> list[tuple[CodedArray, Axes]]:
        """Lists the arrays, those of keys before those of values.

        Args:
            codec: A `Codec`.
            head_dim: `H`.
            value_dim: `Hv`.

        Returns:
            A list of pairs of a `CodedArray` of the codec and its `Axes`.
        """
        keys = [(coded, self.keys) for coded in codec.key_arrays(head_dim)]
        if self.is_one_tensor:
            return keys
        return keys + [(coded, self.values) for coded in codec.value_arrays(value_dim)]

    def shape(
        self, coded: CodedArray, axes: Axes, rows: int, heads: int, slots: int
    ) -> tuple[int, ...]:
        """The shape of one of the arrays.

        Args:
            coded, axes: A pair that `arrays` lists.
            rows: `B`.
            heads: `K`.
            slots: How many slots; a multiple of `coded.tokens`.
        """
        # Of a tensor of both, axis 1 has keys and values.
        shape = [rows, *[2] * (4 if self.is_one_tensor else 3)]
        shape[axes.size], shape[axes.slots] = coded.width, slots // coded.tokens
        shape[self.heads] = heads
        return tuple(shape)


# Keys `(B, K, H, n)` and values `(B, K, n, Hv)`: a product of a few rows with either is
# one with a long matrix that is read row by row.
HEAD_MAJOR = Layout("head_major", 1, Axes(2, 3), Axes(3, 2))
# The tensor `(B, 2, S, K, H)` that users hold in their hands.
DENSE = Layout("dense", -2, Axes(4, 2), Axes(4, 2), is_one_tensor=True)
# Keys `(B, S, K, H)` and values `(B, S, K, Hv)`, where these are of unlike sizes.
DENSE_PAIR = Layout("dense pair", -2, Axes(3, 1), Axes(3, 1))
