"""What one call may attend to."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Segment(NamedTuple):
    """A run of cache slots that isn't read if no query may attend it.

    How its entries lie in memory is its own affair: it is known by two products,
    in both of which batch and heads are merged to one axis. `R` is the number of
    queries that share a key/value head, `G·T`.

    Attributes:
        scores: Function of queries `(B·K, R, H)` and of `first` and `count`: the
            products with the keys of `count` slots from `first` on,
            `(B·K, R, count)`, of float32 or float64. `first` may be traced.
        mix: Function of weights `(B·K, R, count)`, `first` and `count`: the sums
            of values that they weigh, `(B·K, R, Hv)`, of the weights' dtype.
        positions: Absolute position of each slot, int32 `(1, n)` or `(B, n)`;
            -1 where a slot has none.
        block: The most slots for a product with few queries; `None` for all.
    """

    scores: Callable[..., Any]
    mix: Callable[..., Any]
    positions: Any
    block: int | None = None


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
