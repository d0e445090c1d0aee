"""Segments and views: the slots that a call may attend; layouts of their arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
from keras import ops

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


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False, repr=False)
class Segment:
    """A run of slots, which isn't read if no query may attend it.

    Functions of it are in `keras_kvcache.attention.products`.

    Attributes:
        arrays: Coded keys and values, in the order of `layout.arrays(codec, …)`.
        positions: Absolute position of each slot, int32 `(1, n)` or `(B, n)`; -1 where
            a slot has none.
        layout: The `Layout` of the arrays.
        codec: Their `Codec`.
        head_dim: `H`.
        value_dim: `Hv`.
        array_offset: The slot of the arrays that is the segment's first. Only arrays
            without code groups may have more slots than the segment.
        first_position: Position of the first slot if those of the others follow it one
            by one, so that masks over positions can be sliced instead of gathered;
            else `None`.
    """

    arrays: tuple[Any, ...]
    positions: Any
    layout: Layout = field(metadata={"static": True})
    codec: Codec = field(metadata={"static": True})
    head_dim: int = field(metadata={"static": True})
    value_dim: int = field(metadata={"static": True})
    array_offset: int = field(default=0, metadata={"static": True})
    first_position: int | None = field(default=None, metadata={"static": True})


class View(NamedTuple):
    """The slots that one call may attend to.

    Attributes:
        segments: Tuple of `Segment`.
        heads: `K`.
        value_dim: `Hv`.
        fill: Entries at or past this position aren't there: int32 `(1,)` or
            `(B,)`, or `None` if every slot holds one.
        window: `W`: a query sees positions less than `W` away from its own, and
            the sinks. `None` for no window.
        sinks: How many of the first positions no window hides (Xiao et al., 2023,
            https://arxiv.org/abs/2309.17453).
    """

    segments: tuple[Segment, ...]
    heads: int
    value_dim: int
    fill: Any = None
    window: int | None = None
    sinks: int = 0


def slots_of(tensor: Any, first: Any, count: int, axis: int) -> Any:
    """Slices `count` slots on an axis; returns the tensor itself if these are all."""
    if tensor.shape[axis] in (None, count):
        return tensor
    start, shape = [0] * len(tensor.shape), list(ops.shape(tensor))
    start[axis], shape[axis] = first, count
    return ops.slice(tensor, start_of_slice(start), shape)


def start_of_slice(numbers: Sequence[Any]) -> Sequence[Any]:
    """The start indices of a slice, all int32 if one of them is a tensor.

    JAX wants one dtype, and with `jax_enable_x64` takes a Python integer for an int64.
    """
    if all(isinstance(number, int) for number in numbers):
        return numbers
    return [ops.cast(number, "int32") for number in numbers]
