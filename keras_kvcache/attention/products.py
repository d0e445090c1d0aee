"""Products of queries with the keys of a segment, and of weights with its values."""

import re
from typing import Any

import keras
from keras import ops

from keras_kvcache.attention.codecs import AsGiven, Operand, rotate_back
from keras_kvcache.attention.mix import (
    VALUE_BLOCK,
    contract,
    in_blocks,
    is_cut,
    mix_all,
    mix_seen,
    mix_weighed,
)
from keras_kvcache.attention.segments import (
    DENSE_PAIR,
    HEAD_MAJOR,
    Segment,
    View,
    slots_of,
    start_of_slice,
)
from keras_kvcache.runtime.concrete import either, is_recorded
from keras_kvcache.runtime.platform import current_platform

# The most queries, all heads together, that count as few: reading the slots takes
# longer than computing with them.
FEW_QUERIES = 64

# Slots of a dense tensor that few queries are multiplied with at a time: a copy of so
# many fits a processor's cache, and no larger one is made.
DENSE_BLOCK = 1024


def is_few(query: Any) -> bool:
    """Whether queries `(B, K, R, H)` are so few that reading slots takes longest."""
    _, heads, queries, _ = query.shape
    return isinstance(queries, int) and heads * queries <= FEW_QUERIES


def sequence_view(keys: Any, values: Any) -> View:
    """A view of keys and values that were never cached.

    Args:
        keys: Tensor `(B, S, K, H)`.
        values: Tensor `(B, S, K, Hv)`.

    Returns:
        A `View` of one segment; entry `s` stands at position `s`.
    """
    segment = Segment(
        (ops.transpose(keys, (0, 2, 3, 1)), ops.transpose(values, (0, 2, 1, 3))),
        ops.arange(ops.shape(keys)[1], dtype="int32")[None],
        HEAD_MAJOR,
        AsGiven(keras.backend.standardize_dtype(keys.dtype)),
        keys.shape[3],
        values.shape[3],
        first_position=0,
    )
    return View((segment,), keys.shape[2], values.shape[3])


def few_block(segment: Segment) -> int | None:
    """The most slots that few queries are multiplied with at a time; `None` for all."""
    return segment.codec.block if segment.layout == HEAD_MAJOR else DENSE_BLOCK


def keys_of(segment: Segment, first: Any, count: int) -> Operand:
    """Reads `count` slots of a segment's keys.

    Args:
        segment: A `Segment`.
        first: The first slot asked for, an int or an int32 tensor.
        count: How many.

    Returns:
        An `Operand` of keys `(B, K, H, count)`; dense ones are `(B, count, K, H)`.
    """
    arrays, axes = _cut(segment, 0, first, count)
    return segment.codec.read_keys(arrays, segment.head_dim, *axes)


def values_of(segment: Segment, first: Any, count: int) -> Operand:
    """As `keys_of`, for values `(B, K, count, Hv)` or `(B, count, K, Hv)`."""
    arrays, axes = _cut(segment, 1, first, count)
    return segment.codec.read_values(arrays, segment.value_dim, *axes)


def scores_of(segment: Segment, query: Any, first: Any, count: int) -> Any:
    """Products of queries and keys.

    Args:
        segment: A `Segment`.
        query: Tensor `(B, K, R, H)`; `R` queries share a key/value head.
        first, count: As in `keys_of`.

    Returns:
        A tensor `(B, K, R, count)`, float32 or float64.
    """
    keys, scale, _ = keys_of(segment, first, count)
    if segment.layout != HEAD_MAJOR:
        return _dense_scores(segment, query, keys, first, count)
    product = _by_head(_score, "rh,hn->rn", query, keys)
    return product if scale is None else product * ops.cast(scale, product.dtype)


def mix(
    segment: Segment, weights: Any, first: Any, count: int, hides: bool = True
) -> Any:
    """Weighted sums of values; hidden slots, whose weight is 0, add nothing.

    Args:
        segment: A `Segment`.
        weights: Tensor `(B, K, R, count)`, float32 or float64.
        first, count: As in `keys_of`.
        hides: Whether slots may be hidden.

    Returns:
        A tensor `(B, K, R, Hv)` of the weights' dtype.
    """
    if not hides:
        return _mix(segment, mix_all, weights, first, count)
    if keras.distribution.distribution() is not None or is_recorded():
        # Devices would have to ask each other whether all is finite, and a recorded
        # program can't branch.
        return _mix(segment, mix_seen, weights, first, count)
    mixed = _mix(segment, mix_all, weights, first, count)
    return either(
        ops.all(ops.isfinite(mixed)),
        lambda: mixed,
        lambda: _mix_in_blocks(segment, weights, first, count),
    )


def _cut(segment, half, first, count):
    """Slices the arrays of keys (`half` 0) or values (1); also returns their axes."""
    layout, offset = segment.layout, segment.array_offset
    first = first + offset if offset else first
    if layout.is_one_tensor:
        return (_half(*segment.arrays, half, first, count),), DENSE_PAIR.keys
    axes = (layout.keys, layout.values)[half]
    arrays = layout.arrays(segment.codec, segment.head_dim, segment.value_dim)
    tokens = [coded.tokens for coded, _ in arrays]
    split = len(segment.codec.key_arrays(segment.head_dim))
    own = slice(0, split) if half == 0 else slice(split, None)
    pairs = zip(segment.arrays[own], tokens[own], strict=True)
    return tuple(
        slots_of(array, first // each, count // each, axes.slots)
        for array, each in pairs
    ), axes


def _half(array, half, first, count):
    """Slices the keys (`half` 0) or values (1) of an array `(B, 2, S, K, H)`."""
    batch, _, slots, heads, width = ops.shape(array)
    if count == slots:
        return array[:, half]
    place = start_of_slice((0, half, first, 0, 0))
    part = ops.slice(array, place, (batch, 1, count, heads, width))
    return part[:, 0]


def _dense_scores(segment, query, keys, first, count):
    """`scores_of` keys `(B, count, K, H)`.

    A product head by head has to copy them to another order. Few queries are instead
    laid out block-diagonally, `(K·R, K·H)` with zeros where a query meets another head,
    and multiplied with whole slots, `(n, K·H)`: more arithmetic, but only reading. Many
    queries pay for the copy.
    """

    # A recorded program can't branch on whether all is finite.
    if not is_few(query) or is_recorded():
        return _scores_by_head(query, keys)
    batch, _, heads, head_dim = ops.shape(keys)
    flat = ops.reshape(keys, (batch, count, heads * head_dim))
    product = _score("brf,bnf->brn", _spread(query), flat)
    product = ops.reshape(product, (*ops.shape(query)[:3], count))
    if keras.distribution.distribution() is not None:
        return product
    # Keys of other heads may be infinite, and 0 times that is NaN.
    return either(
        ops.all(ops.isfinite(product)),
        lambda: product,
        lambda: in_blocks(
            lambda start, size: _scores_by_head(
                query, keys_of(segment, first + start, size).matrix
            ),
            product,
        ),
    )


def _scores_by_head(query, keys):
    keys_last = ops.transpose(keys, (0, 2, 3, 1))
    return _by_head(_score, "rh,hn->rn", query, keys_last)


def _mix(segment, product, weights, first, count):
    """`mix` by one of the products of `mix.py`."""
    values, scale, rotation = values_of(segment, first, count)
    if segment.layout != HEAD_MAJOR:
        return _dense_mix(product, weights, values, count)
    if scale is not None:
        # Weights of 0 stay 0, whatever the scale.
        scale = ops.transpose(scale, (0, 1, 3, 2))
        scaled = weights * ops.cast(scale, weights.dtype)
        weights = ops.where(weights == 0, weights, scaled)
    return rotate_back(_by_head(product, "rn,nh->rh", weights, values), rotation)


def _dense_mix(product, weights, values, count):
    """The same of values `(B, count, K, Hv)`; for few queries as in `_dense_scores`."""
    if not is_few(weights):
        values = ops.transpose(values, (0, 2, 1, 3))
        return _by_head(product, "rn,nh->rh", weights, values)
    batch, heads, queries, _ = ops.shape(weights)
    value_dim = values.shape[3]
    weights = ops.reshape(weights, (batch, heads * queries, count))
    values = ops.reshape(values, (batch, count, heads * value_dim))
    mixed = product("brn,bnf->brf", weights, values)
    return _gather(mixed, (batch, heads, queries, value_dim))


def _mix_in_blocks(segment, weights, first, count):
    """`mix` block by block, with each query's own zeros, which takes little memory."""
    if not is_cut(count, VALUE_BLOCK):
        return _mix(segment, mix_weighed, weights, first, count)

    def add(number, mixed):
        # The last block reaches back to where one fits.
        begin = ops.cast(number, "int32") * VALUE_BLOCK
        start = ops.minimum(begin, count - VALUE_BLOCK)
        part = slots_of(weights, start, VALUE_BLOCK, axis=3)
        is_new = start + ops.arange(VALUE_BLOCK, dtype="int32") >= begin
        part = ops.where(is_new[None, None, None], part, ops.zeros_like(part))
        return mixed + _mix(segment, mix_weighed, part, first + start, VALUE_BLOCK)

    mixed = _mix(segment, mix_weighed, weights[..., :VALUE_BLOCK], first, VALUE_BLOCK)
    return ops.fori_loop(1, -(-count // VALUE_BLOCK), add, mixed)


def _by_head(product, equation, x, y):
    """A product for each row and head: `(B, K, …)` both.

    On a CPU a batch axis of size 1 beside that of heads costs a factor of ten, so
    the two are merged. Where they are spread over devices each keeps to its own.
    """
    if x.shape[2] == 1 and current_platform().doubles_row_of_slots:
        # For one row XLA wouldn't use matrix units, and would copy the slots to
        # another layout at each step.
        two_rows = ops.concatenate([x, x], axis=2)
        return _by_head(product, equation, two_rows, y)[:, :, :1]
    of_x, of_y, result = re.split(",|->", equation)
    if keras.distribution.distribution() is not None:
        return product(f"bk{of_x},bk{of_y}->bk{result}", x, y)
    shape = ops.shape(x)[:2]
    merged = product(f"x{of_x},x{of_y}->x{result}", _merge_heads(x), _merge_heads(y))
    return ops.reshape(merged, (*shape, *ops.shape(merged)[1:]))


def _merge_heads(x):
    """`(B, K, …)` to `(B·K, …)`."""
    batch, heads, *rest = ops.shape(x)
    return ops.reshape(x, (batch * heads, *rest))


def _spread(query):
    """Block-diagonal: `(B, K, R, H)` to `(B, K·R, K·H)`."""
    batch, heads, queries, head_dim = ops.shape(query)
    query = ops.reshape(query, (batch, heads, queries, 1, head_dim))
    query = query * _own_head(heads, query.dtype)
    return ops.reshape(query, (batch, heads * queries, heads * head_dim))


def _gather(product, shape):
    """The diagonal blocks: `(B, K·R, K·H)` to the shape `(B, K, R, H)`."""
    batch, heads, queries, head_dim = shape
    product = ops.reshape(product, (batch, heads, queries, heads, head_dim))
    # Not a sum of products: blocks of other heads may be infinite.
    own = ops.where(_own_head(heads, "bool"), product, 0.0)
    return ops.sum(own, axis=3)


def _own_head(heads, dtype):
    return ops.reshape(ops.eye(heads, dtype=dtype), (heads, 1, heads, 1))


def sum_dtype(operand: Any) -> str:
    """The dtype that sums are computed in: float64 for float64, else float32."""
    dtype = keras.backend.standardize_dtype(operand.dtype)
    return "float64" if dtype == "float64" else "float32"


def _score(equation, query, keys):
    return contract(equation, query, keys, sum_dtype(query))
