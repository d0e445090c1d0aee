"""What one call may attend to."""

from collections.abc import Callable
from typing import Any, NamedTuple

from keras import ops


class Segment(NamedTuple):
    """A run of cache slots that is read whole or not at all.

    Attributes:
        read: Function without arguments that gives `(keys, values)`, head-major:
            `(B, K, n, H)` each. It's called only if some query may attend one of
            the slots, so that an empty segment costs nothing.
        positions: Absolute position of each slot, int32 `(1, n)` or `(B, n)`;
            -1 where a slot has none.
    """

    read: Callable[[], tuple[Any, Any]]
    positions: Any


class View(NamedTuple):
    """The slots that one call may attend to.

    Attributes:
        segments: Tuple of `Segment`. Put one behind another their slots are the
            `S` of an attention mask `(B, T, S)`.
        heads: `K`.
        value_dim: `Hv`.
        fill: Entries at or past this position aren't there: int32 `(1,)` or
            `(B,)`, or `None` if every slot holds one.
    """

    segments: tuple[Segment, ...]
    heads: int
    value_dim: int
    fill: Any = None


def sequence_view(keys, values):
    """A view of keys and values that were never cached.

    Args:
        keys: Tensor `(B, S, K, H)`.
        values: Tensor `(B, S, K, Hv)`.

    Returns:
        A `View` of one segment; entry `s` stands at position `s`.
    """

    def read():
        return ops.transpose(keys, (0, 2, 1, 3)), ops.transpose(values, (0, 2, 1, 3))

    positions = ops.arange(ops.shape(keys)[1], dtype="int32")[None]
    return View((Segment(read, positions),), keys.shape[2], values.shape[3])
