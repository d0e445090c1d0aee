"""Products of queries with keys and of weights with values, layout by layout.

Batch and key/value heads are merged to one axis, `(B·K, …)`: on a CPU a separate
batch axis of size 1 costs a factor of ten.
"""

import keras
from keras import ops

from keras_kvcache.ops.view import Segment, View

# The most queries, all heads together, that count as few: reading the slots takes
# longer than computing with them.
FEW_QUERIES = 64

# Slots of a dense tensor that few queries are multiplied with at a time: a copy of so
# many fits a processor's cache, and no larger one is made.
DENSE_BLOCK = 1024


def is_few(query, heads):
    """Whether queries `(B·K, R, H)` are few enough to be bound by reading."""
    rows = query.shape[1]
    return rows is not None and heads * rows <= FEW_QUERIES


def head_major_segment(keys, values, positions):
    """A segment whose heads come before its slots.

    Keys have their slots last: `(R, H) × (H, n)` and `(R, n) × (n, Hv)` are
    products of a few rows with a long matrix that is read row by row.

    Args:
        keys: Tensor `(B, K, H, n)`.
        values: Tensor `(B, K, n, Hv)`.
        positions: As in `Segment`.

    Returns:
        A `Segment`.
    """

    def scores(query, first, count):
        part = _slots(keys, first, count, axis=3)
        part = ops.reshape(part, (ops.shape(query)[0], *ops.shape(part)[2:]))
        return _score("xrh,xhn->xrn", query, part)

    def mix(weights, first, count):
        part = _slots(values, first, count, axis=2)
        part = ops.reshape(part, (ops.shape(weights)[0], *ops.shape(part)[2:]))
        return _mix("xrn,xnh->xrh", weights, part)

    return Segment(scores, mix, positions)


def sequence_view(keys, values):
    """A view of keys and values that were never cached.

    Args:
        keys: Tensor `(B, S, K, H)`.
        values: Tensor `(B, S, K, Hv)`.

    Returns:
        A `View` of one segment; entry `s` stands at position `s`.
    """
    segment = head_major_segment(
        ops.transpose(keys, (0, 2, 3, 1)),
        ops.transpose(values, (0, 2, 1, 3)),
        ops.arange(ops.shape(keys)[1], dtype="int32")[None],
    )
    return View((segment,), keys.shape[2], values.shape[3])


def dense_segment(tensor, origin, positions):
    """Some slots of a dense cache.

    Its heads lie within its slots, so a product head by head has to copy it to
    another order. Few queries are instead laid out block-diagonally, `(K·R, K·H)`
    with zeros where a query meets another head, and multiplied with whole slots,
    `(n, K·H)`: more arithmetic, but only reading. Many queries pay for the copy.

    Args:
        tensor: Tensor `(B, 2, S, K, H)`.
        origin: The first of the slots.
        positions: As in `Segment`.

    Returns:
        A `Segment`.
    """
    batch, heads, head_dim = ops.shape(tensor)[0], *tensor.shape[3:]

    def read(half, first, count):
        start = (0, half, origin + first, 0, 0)
        return ops.slice(tensor, start, (batch, 1, count, heads, head_dim))[:, 0]

    def scores(query, first, count):
        keys = read(0, first, count)
        if is_few(query, heads):
            keys = ops.reshape(keys, (batch, count, heads * head_dim))
            product = _score("brf,bnf->brn", _spread(query, batch, heads), keys)
            return ops.reshape(product, (*ops.shape(query)[:2], count))
        keys = ops.transpose(keys, (0, 2, 3, 1))
        keys = ops.reshape(keys, (batch * heads, head_dim, count))
        return _score("xrh,xhn->xrn", query, keys)

    def mix(weights, first, count):
        values = read(1, first, count)
        if is_few(weights, heads):
            rows = weights.shape[1]
            weights = ops.reshape(weights, (batch, heads * rows, count))
            values = ops.reshape(values, (batch, count, heads * head_dim))
            product = _mix("brn,bnf->brf", weights, values)
            return _gather(product, (batch, heads, rows, head_dim))
        values = ops.transpose(values, (0, 2, 1, 3))
        values = ops.reshape(values, (batch * heads, count, head_dim))
        return _mix("xrn,xnh->xrh", weights, values)

    return Segment(scores, mix, positions, DENSE_BLOCK)


def _slots(tensor, first, count, axis):
    """`count` slots on an axis; the tensor itself if these are all."""
    if tensor.shape[axis] in (None, count):
        return tensor
    start, shape = [0] * len(tensor.shape), list(ops.shape(tensor))
    start[axis], shape[axis] = first, count
    return ops.slice(tensor, start, shape)


def _spread(query, batch, heads):
    """Block-diagonal: `(B·K, R, H)` to `(B, K·R, K·H)`."""
    rows, head_dim = query.shape[1:]
    query = ops.reshape(query, (batch, heads, rows, 1, head_dim))
    query = query * _own_head(heads, query.dtype)
    return ops.reshape(query, (batch, heads * rows, heads * head_dim))


def _gather(product, shape):
    """Each head's own part: `(B, K·R, K·H)` to `(B·K, R, H)`; `shape` has the sizes."""
    batch, heads, rows, head_dim = shape
    product = ops.reshape(product, (batch, heads, rows, heads, head_dim))
    # Not a sum of products: what belongs to other heads may be infinite.
    own = ops.where(_own_head(heads, "bool"), product, 0.0)
    return ops.reshape(ops.sum(own, axis=3), (batch * heads, rows, head_dim))


def _own_head(heads, dtype):
    return ops.reshape(ops.eye(heads, dtype=dtype), (heads, 1, heads, 1))


def sum_dtype(operand):
    """What scores and sums are computed in, however narrow queries and slots are."""
    dtype = keras.backend.standardize_dtype(operand.dtype)
    return "float64" if dtype == "float64" else "float32"


def contract(equation, x, y, dtype):
    """`einsum` that sums in `dtype`; JAX can without widening the operands first."""
    if keras.backend.backend() == "jax":
        import jax.numpy as jnp

        return jnp.einsum(equation, x, y, preferred_element_type=dtype)
    return ops.einsum(equation, ops.cast(x, dtype), ops.cast(y, dtype))


def _score(equation, query, keys):
    return contract(equation, query, keys, sum_dtype(query))


def _mix(equation, weights, values):
    """Weights become as narrow as the values; their sum doesn't."""
    return contract(equation, ops.cast(weights, values.dtype), values, weights.dtype)
