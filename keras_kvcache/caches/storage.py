"""Slots in memory: arrays of a layout, coded by a codec."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from keras import ops

from keras_kvcache.attention import Segment, splice
from keras_kvcache.attention.codecs import Codec
from keras_kvcache.attention.ring import ring_positions, write_ring
from keras_kvcache.attention.segments import Layout
from keras_kvcache.runtime.sharding import distribute


class SlotAxis(NamedTuple):
    """The axis of an array that has the slots.

    Attributes:
        slots: Axis of the slots.
        tokens: Slots that share an entry of it.
    """

    slots: int
    tokens: int


@dataclass(frozen=True, eq=False, repr=False)
class Storage(abc.ABC):
    """Some slots of keys and values, in one or more segments.

    It doesn't keep positions: who calls it says them. New entries come as a storage
    too, of one segment, the same layout and the same codec.

    Attributes:
        segments: For each segment a tuple of arrays, those of keys before those of
            values, in the order of the codec's parts. Axis 0 is `B` in all.
        codec: A `Codec`.
        head_dim: `H`.
        value_dim: `Hv`.
    """

    segments: tuple[tuple[Any, ...], ...]
    codec: Codec = field(metadata={"static": True})
    head_dim: int = field(metadata={"static": True})
    value_dim: int = field(metadata={"static": True})

    @staticmethod
    @abc.abstractmethod
    def layout_of(head_dim: int, value_dim: int) -> Layout:
        """The `Layout` of the arrays, by the sizes `H` and `Hv`."""

    @staticmethod
    def sizes_of(slots: int, codec: Codec) -> tuple[int, ...]:
        """Slots of each segment when `slots` are allocated; they add up to these."""
        return (slots,)

    @classmethod
    def allocate(
        cls, spec: Any, slots: int, codec: Codec, make: Callable[..., Any]
    ) -> Storage:
        """Empty slots.

        Args:
            spec: A `CacheSpec`.
            slots: How many; a multiple of the codec's group.
            codec: A `Codec`.
            make: Function of a shape, a dtype and the axis of the heads that gives an
                array.
        """
        rows, heads = spec.batch_size, spec.num_key_value_heads
        sizes = (spec.head_dim, spec.value_dim or spec.head_dim)
        layout = cls.layout_of(*sizes)
        segments = tuple(
            tuple(
                make(
                    layout.shape(coded, axes, rows, heads, size),
                    coded.dtype,
                    layout.heads,
                )
                for coded, axes in layout.arrays(codec, *sizes)
            )
            for size in cls.sizes_of(slots, codec)
        )
        return cls(segments, codec, *sizes)

    @property
    def layout(self) -> Layout:
        """The `Layout` of the arrays."""
        return self.layout_of(self.head_dim, self.value_dim)

    @property
    def slot_axes(self) -> tuple[SlotAxis, ...]:
        """A `SlotAxis` for each array of a segment."""
        arrays = self.layout.arrays(self.codec, self.head_dim, self.value_dim)
        return tuple(SlotAxis(axes.slots, coded.tokens) for coded, axes in arrays)

    @property
    def heads(self) -> int:
        """`K`."""
        return self.segments[0][0].shape[self.layout.heads]

    @abc.abstractmethod
    def encode(self, key: Any, value: Any, codec: Codec | None = None) -> Storage:
        """New entries `(B, T, K, H)` and `(B, T, K, Hv)` as a storage of `T` slots.

        Args:
            key: Tensor `(B, T, K, H)`.
            value: Tensor `(B, T, K, Hv)`.
            codec: `None` for the storage's own.
        """

    @abc.abstractmethod
    def place_of(self, first: int, size: int) -> tuple[Sequence[Any], int]:
        """Which arrays hold some slots, and the number of the first slot in them.

        Args:
            first, size: One of the pairs that `spans` gives.
        """

    def segment(
        self, first: int, size: int, positions: Any, first_position: int | None = None
    ) -> Segment:
        """Some slots for attention, a `keras_kvcache.attention.Segment`.

        Args:
            first, size: One of the pairs that `spans` gives.
            positions: As in `Segment`.
            first_position: As in `Segment`.
        """
        arrays, offset = self.place_of(first, size)
        sizes = (self.head_dim, self.value_dim)
        static = (self.layout, self.codec, *sizes, offset, first_position)
        return Segment(arrays, positions, *static)

    def all_segments(
        self, positions_of: Callable[[int, int], Any]
    ) -> tuple[Segment, ...]:
        """All slots for attention.

        Args:
            positions_of: Function of a first slot and of a number of slots that gives
                their positions, as `Segment` has them.
        """
        return tuple(self.segment(*span, positions_of(*span)) for span in self.spans)

    @abc.abstractmethod
    def merge(self) -> Storage:
        """The same slots in one segment."""

    @abc.abstractmethod
    def resize(self, slots: int) -> Storage:
        """The first `slots` slots, with empty ones added if there are fewer.

        Args:
            slots: How many; a multiple of the codec's group.
        """

    @abc.abstractmethod
    def decode(self) -> tuple[Any, Any]:
        """Keys `(B, S, K, H)` and values `(B, S, K, Hv)` of all slots, as floats."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Slots of each segment."""
        slots, tokens = self.slot_axes[0]
        entries = (arrays[0].shape[slots] for arrays in self.segments)
        # Of a tensor in a functional model the number may be unknown.
        return tuple(size if tokens == 1 else size * tokens for size in entries)

    @property
    def slots(self) -> int:
        """Slots of all segments."""
        return self.sizes[0] if len(self.sizes) == 1 else sum(self.sizes)

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """First slot and number of slots of each segment for attention."""
        first, spans = 0, []
        for size in self.sizes:
            spans.append((first, size))
            first += size
        return tuple(spans)

    def write(self, entries: Storage, slot: Any) -> Storage:
        """Writes entries from a slot on; what doesn't fit is dropped.

        Args:
            entries: A `Storage` of `T` slots, as of `encode`.
            slot: An int, or an int32 tensor of shape `()` or `(B,)`; with a codec of
                groups the first slot of one.

        Returns:
            The storage with the entries.
        """

        slot = _distribute_rows(slot)

        def put(array, update, where, first):
            # Seen from a segment, most writes are past its end and dropped.
            index = (slot - first) // where.tokens if where.tokens > 1 else slot - first
            return splice(array, update, index, axis=where.slots)

        return self._with_entries(put, entries)

    def write_ring(self, entries: Storage, start: Any, end: Any) -> Storage:
        """Writes entries each to the slot of its position, the slots being a ring.

        Args:
            entries: A `Storage` of `T` slots, as of `encode`.
            start: int32 `(1 | B,)`, position of the first entry.
            end: int32 `(1 | B,)`; entries from this position on aren't written.

        Returns:
            The storage with the entries.
        """
        ring = self.slots
        start, end = _distribute_rows(start), _distribute_rows(end)

        def put(array, update, where, first):
            slots, tokens = where
            units = [start, end] if tokens == 1 else [start // tokens, end // tokens]
            return write_ring(
                array, update, *units, ring // tokens, first // tokens, slots
            )

        return self._with_entries(put, entries)

    def _with_entries(self, put, entries):
        updates, slot_axes = entries.distributed().segments[0], self.slot_axes
        segments, first = [], 0
        for arrays, size in zip(self.distributed().segments, self.sizes, strict=True):
            triples = zip(arrays, updates, slot_axes, strict=True)
            segments.append(tuple(put(*triple, first) for triple in triples))
            first += size
        return replace(self, segments=tuple(segments)).distributed()

    def distributed(self) -> Storage:
        """The storage laid out over devices as `keras.distribution` has it.

        Without this, XLA might choose another layout for the arrays that a loop carries
        and gather them there.
        """
        segments = (
            tuple(distribute(array, self.layout.heads) for array in arrays)
            for arrays in self.segments
        )
        return replace(self, segments=tuple(segments))

    def reroll(self, slots: int, fill: Any) -> Storage:
        """Copies the entries of a ring to a ring of another size.

        Args:
            slots: How many slots that has; a multiple of the codec's group.
            fill: int32 `(1 | B,)`: positions below it were written.

        Returns:
            A `Storage`; slots whose position wasn't held have undefined entries.
        """
        ring, group = self.slots, self.codec.group
        whole = self.merge()
        positions = ring_positions(fill // group, slots // group)
        source = ops.mod(positions, ring // group)

        def move(array, axis, first, size):
            width = group // axis.tokens
            return _parts_of_rows(array, source, width, axis.slots)

        return whole.map(move).resize(slots)

    def take(self, slot: Any, count: int) -> Storage:
        """Gathers a run of slots from each row into a storage of one segment.

        Args:
            slot: int32 `(1 | B,)`, a multiple of `count`.
            count: How many; it divides the size of every segment.

        Returns:
            A `Storage`; what it holds is undefined in rows whose slot is out of range.
        """
        found, first = None, 0
        for arrays, size in zip(self.segments, self.sizes, strict=True):
            held = tuple(
                _part_of_rows(array, (slot - first) // count, count // tokens, slots)
                for array, (slots, tokens) in zip(arrays, self.slot_axes, strict=True)
            )
            if found is None:
                found = held
            else:
                found = select_rows(slot >= first, held, found)
            first += size
        return replace(self, segments=(found,))

    def map(self, function: Callable[..., Any]) -> Storage:
        """Applies a function to each array of each segment.

        Args:
            function: Function of the array, its `SlotAxis`, the segment's first slot
                and its number of slots. Its result may have more or fewer slots.
        """
        segments, first = [], 0
        for arrays, size in zip(self.segments, self.sizes, strict=True):
            pairs = zip(arrays, self.slot_axes, strict=True)
            segments.append(tuple(function(*pair, first, size) for pair in pairs))
            first += size
        return replace(self, segments=tuple(segments))


def slot_positions(first: int, size: int) -> Any:
    """Positions `(1, size)` of slots from `first` on if slot `p` has position `p`."""
    return first + ops.arange(size, dtype="int32")[None]


def _distribute_rows(positions):
    """An integer of each row, laid out over devices as the rows are."""
    has_rows = ops.is_tensor(positions) and len(positions.shape) == 1
    return distribute(positions) if has_rows else positions


def select_rows(
    predicate: Any, chosen: Sequence[Any], other: Sequence[Any]
) -> tuple[Any, ...]:
    """Arrays of `chosen` where a predicate `(1 | B,)` holds, else of `other`."""

    def select(a, b):
        rows = ops.reshape(predicate, [-1] + [1] * (len(a.shape) - 1))
        return ops.where(rows, a, b)

    return tuple(select(*pair) for pair in zip(chosen, other, strict=True))


def _part_of_rows(array, number, width, axis):
    """Gathers part `number (1 | B,)` of each row, an axis being cut into `width`s."""
    return _parts_of_rows(array, ops.maximum(number, 0)[:, None], width, axis)


def _parts_of_rows(array, numbers, width, axis):
    """As `_part_of_rows`, with several parts: `numbers (1 | B, any)`."""
    shape = ops.shape(array)
    parts, count = array.shape[axis] // width, numbers.shape[1]
    array = ops.reshape(array, (*shape[:axis], parts, width, *shape[axis + 1 :]))
    numbers = ops.clip(numbers, 0, parts - 1)
    wanted = [1] * len(array.shape)
    wanted[0], wanted[axis] = -1, count
    numbers = ops.reshape(numbers, wanted)
    numbers = ops.broadcast_to(
        numbers, (*shape[:axis], count, width, *shape[axis + 1 :])
    )
    taken = ops.take_along_axis(array, numbers, axis=axis)
    return ops.reshape(taken, (*shape[:axis], count * width, *shape[axis + 1 :]))
