"""Products of queries with keys and of weights with values, layout by layout."""

import re
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_kvcache.ops.known import either, is_recorded
from keras_kvcache.ops.mix import contract, in_blocks, make_mix
from keras_kvcache.ops.platform import is_tpu
from keras_kvcache.ops.view import Segment, View, slots_of

# The most queries, all heads together, that count as few: reading the slots takes
# longer than computing with them.
FEW_QUERIES = 64

# Slots of a dense tensor that few queries are multiplied with at a time: a copy of so
# many fits a processor's cache, and no larger one is made.
DENSE_BLOCK = 1024


def is_few(query):
    """Whether queries `(B, K, R, H)` are few enough to be bound by reading."""
    _, heads, rows, _ = query.shape
    return isinstance(rows, int) and heads * rows <= FEW_QUERIES


class Read(NamedTuple):
    """Some slots of keys or values, ready for a product.

    Attributes:
        matrix: Their numbers, still to be multiplied with the scale.
        scale: One factor a slot and head, 1 in the place of the head size; `None`
            for none. It's folded into scores and weights.
        rotation: Orthogonal matrix `(Hv, Hv)` that values were multiplied with;
            `None` for none. Their sums are turned back, not they themselves.
    """

    matrix: Any
    scale: Any = None
    rotation: Any = None


def head_major_segment(
    read_keys, read_values, positions, block=None, first=None, arrays=None
):
    """A segment whose heads come before its slots.

    Keys have their slots last: `(R, H) × (H, n)` and `(R, n) × (n, Hv)` are
    products of a few rows with a long matrix that is read row by row.

    Args:
        read_keys: Function of `first` and `count`: a `Read` of keys `(B, K, H,
            count)`.
        read_values: Function of `first` and `count`: a `Read` of values `(B, K,
            count, Hv)`.
        positions, block, first, arrays: As in `Segment`.

    Returns:
        A `Segment`.
    """

    def scores(query, first, count):
        keys, scale, _ = read_keys(first, count)
        product = _by_head(_score, "rh,hn->rn", query, keys)
        return _scaled(product, scale, (0, 1, 2, 3))

    def mix_slots(product, weights, first, count):
        values, scale, rotation = read_values(first, count)
        weights = _weighed(weights, scale, (0, 1, 3, 2))
        return turn_back(_by_head(product, "rn,nh->rh", weights, values), rotation)

    return Segment(scores, make_mix(mix_slots), positions, block, first, arrays)


def sequence_view(keys, values):
    """A view of keys and values that were never cached.

    Args:
        keys: Tensor `(B, S, K, H)`.
        values: Tensor `(B, S, K, Hv)`.

    Returns:
        A `View` of one segment; entry `s` stands at position `s`.
    """
    keys_last = ops.transpose(keys, (0, 2, 3, 1))
    values_last = ops.transpose(values, (0, 2, 1, 3))
    segment = head_major_segment(
        reader(keys_last, axis=3),
        reader(values_last, axis=2),
        ops.arange(ops.shape(keys)[1], dtype="int32")[None],
        first=0,
    )
    return View((segment,), keys.shape[2], values.shape[3])


def dense_segment(
    read_keys, read_values, positions, heads, first=None, arrays=None, start=0
):
    """A segment whose heads lie within its slots.

    A product head by head has to copy them to another order. Few queries are
    instead laid out block-diagonally, `(K·R, K·H)` with zeros where a query meets
    another head, and multiplied with whole slots, `(n, K·H)`: more arithmetic, but
    only reading. Many queries pay for the copy.

    Args:
        read_keys: Function of `first` and `count`: keys `(B, count, K, H)`.
        read_values: Function of `first` and `count`: values `(B, count, K, Hv)`.
        heads: `K`.
        positions, first, arrays, start: As in `Segment`.

    Returns:
        A `Segment`.
    """

    def scores(query, first, count):
        keys = read_keys(first, count)

        def by_head(keys):
            keys_last = ops.transpose(keys, (0, 2, 3, 1))
            return _by_head(_score, "rh,hn->rn", query, keys_last)

        # A recorded program can't branch on whether all is finite.
        if is_few(query) and not is_recorded():
            batch, head_dim = ops.shape(keys)[0], keys.shape[3]
            flat = ops.reshape(keys, (batch, count, heads * head_dim))
            product = _score("brf,bnf->brn", _spread(query), flat)
            product = ops.reshape(product, (*ops.shape(query)[:3], count))
            if keras.distribution.distribution() is None:
                # Keys of other heads may be infinite, and 0 times that is NaN.
                is_finite = ops.all(ops.isfinite(product))
                product = either(
                    is_finite,
                    lambda: product,
                    lambda: in_blocks(
                        lambda start, size: by_head(read_keys(first + start, size)),
                        product,
                    ),
                )
            return product
        return by_head(keys)

    def mix_slots(product, weights, first, count):
        values = read_values(first, count)
        batch, value_dim = ops.shape(values)[0], values.shape[3]
        if is_few(weights):
            rows = weights.shape[2]
            weights = ops.reshape(weights, (batch, heads * rows, count))
            values = ops.reshape(values, (batch, count, heads * value_dim))
            mixed = product("brn,bnf->brf", weights, values)
            return _gather(mixed, (batch, heads, rows, value_dim))
        values = ops.transpose(values, (0, 2, 1, 3))
        return _by_head(product, "rn,nh->rh", weights, values)

    mix = make_mix(mix_slots)
    return Segment(scores, mix, positions, DENSE_BLOCK, first, arrays, start)


def reader(tensor, axis):
    """A function that reads slots on an axis of a tensor as they are."""
    return lambda first, count: Read(slots_of(tensor, first, count, axis))


def turn_back(values, rotation):
    """Values `(…, Hv)` as they were before a rotation."""
    if rotation is None:
        return values
    return ops.matmul(values, ops.cast(rotation.T, values.dtype))


def _scaled(product, scale, axes):
    """`(B, K, R, n)` with a factor for each slot, whose axes come in another order."""
    if scale is None:
        return product
    return product * ops.cast(ops.transpose(scale, axes), product.dtype)


def _weighed(weights, scale, axes):
    """`_scaled` weights; weights of 0 stay 0, whatever the scale."""
    if scale is None:
        return weights
    return ops.where(weights == 0, weights, _scaled(weights, scale, axes))


def _by_head(product, equation, x, y):
    """A product for each row and head: `(B, K, …)` both.

    On a CPU a batch axis of size 1 beside that of heads costs a factor of ten, so
    the two are merged. Where they are spread over devices each keeps to its own.
    """
    if x.shape[2] == 1 and is_tpu():
        # For one row XLA wouldn't use matrix units, and would copy the slots to
        # another layout at each step.
        two_rows = ops.concatenate([x, x], axis=2)
        return _by_head(product, equation, two_rows, y)[:, :, :1]
    of_x, of_y, result = re.split(",|->", equation)
    if keras.distribution.distribution() is not None:
        return product(f"bk{of_x},bk{of_y}->bk{result}", x, y)
    shape = ops.shape(x)[:2]
    merged = product(f"x{of_x},x{of_y}->x{result}", _merge(x), _merge(y))
    return ops.reshape(merged, (*shape, *ops.shape(merged)[1:]))


def _merge(x):
    """`(B, K, …)` to `(B·K, …)`."""
    batch, heads, *rest = ops.shape(x)
    return ops.reshape(x, (batch * heads, *rest))


def _spread(query):
    """Block-diagonal: `(B, K, R, H)` to `(B, K·R, K·H)`."""
    batch, heads, rows, head_dim = ops.shape(query)
    query = ops.reshape(query, (batch, heads, rows, 1, head_dim))
    query = query * _own_head(heads, query.dtype)
    return ops.reshape(query, (batch, heads * rows, heads * head_dim))


def _gather(product, shape):
    """Each head's own part: `(B, K·R, K·H)` to the shape `(B, K, R, H)`."""
    batch, heads, rows, head_dim = shape
    product = ops.reshape(product, (batch, heads, rows, heads, head_dim))
    # Not a sum of products: what belongs to other heads may be infinite.
    own = ops.where(_own_head(heads, "bool"), product, 0.0)
    return ops.sum(own, axis=3)


def _own_head(heads, dtype):
    return ops.reshape(ops.eye(heads, dtype=dtype), (heads, 1, heads, 1))


def sum_dtype(operand):
    """The dtype that sums are computed in: float64 for float64, else float32."""
    dtype = keras.backend.standardize_dtype(operand.dtype)
    return "float64" if dtype == "float64" else "float32"


def _score(equation, query, keys):
    return contract(equation, query, keys, sum_dtype(query))
