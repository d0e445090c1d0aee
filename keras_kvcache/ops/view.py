"""What one call may attend to."""

from collections.abc import Callable
from typing import Any, NamedTuple

from keras import ops


class Segment(NamedTuple):
    """A run of cache slots that isn't read if no query may attend it.

    How its entries lie in memory is its own affair: it is known by two products.
    `R` is the number of queries that share a key/value head, `G·T`.

    Attributes:
        scores: Function of queries `(B, K, R, H)` and of `first` and `count`: the
            products with the keys of `count` slots from `first` on,
            `(B, K, R, count)`, of float32 or float64. `first` may be traced.
        mix: Function of weights `(B, K, R, count)`, `first`, `count` and whether slots
            may be hidden, whose weights are 0: the sums of values that they weigh,
            `(B, K, R, Hv)`, of the weights' dtype.
        positions: Absolute position of each slot, int32 `(1, n)` or `(B, n)`;
            -1 where a slot has none.
        block: The most slots for a product with few queries; `None` for all.
        first: Position of the first slot if the others follow it one by one, so
            that masks over positions can be cut instead of looked up; else `None`.
        arrays: What a kernel may read in the place of the products: keys `(B, K, H,
            n)` and values `(B, K, n, Hv)`, float32, bfloat16 or int16 for the bits of
            bfloat16; or int8 codes of them, each followed by a float32 scale for every
            slot, `(B, K, 1, n)` and `(B, K, n, 1)`. Or one tensor of both, `(B, 2, S,
            K, H)`, without codes, of whose slots the segment has some. `None` if
            something else is held.
        start: Which of the slots of `arrays` is its first; 0 if head-major.
    """

    scores: Callable[..., Any]
    mix: Callable[..., Any]
    positions: Any
    block: int | None = None
    first: int | None = None
    arrays: tuple[Any, ...] | None = None
    start: int = 0


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


def slots_of(tensor, first, count, axis):
    """`count` slots on an axis; the tensor itself if these are all."""
    if tensor.shape[axis] in (None, count):
        return tensor
    start, shape = [0] * len(tensor.shape), list(ops.shape(tensor))
    start[axis], shape[axis] = first, count
    return ops.slice(tensor, start_of_slice(start), shape)


def start_of_slice(numbers):
    """Where a slice begins on each axis, all int32 if one of them is a tensor.

    JAX wants one dtype, and with `jax_enable_x64` takes a Python integer for an int64.
    """
    if all(isinstance(number, int) for number in numbers):
        return numbers
    return [ops.cast(number, "int32") for number in numbers]
