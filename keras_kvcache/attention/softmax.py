"""Softmax over what may be attended."""

from keras import ops

# Stands for "nothing seen yet": finite, so that differences of two of them are
# zero and not NaN, and far below any score.
LOWEST = -1e30


def masked_softmax(scores, mask=None, axis=-1, sink=None):
    """Softmax in which masked scores weigh nothing, even if all are masked.

    Args:
        scores: Float tensor.
        mask: Boolean tensor that broadcasts to `scores`, `False` where a score
            doesn't count. `None` counts all.
        axis: Axis or axes that sum to one (to zero where all is masked).
        sink: One more score, which takes its share and isn't returned: tensor that
            broadcasts to `scores` with 1 on `axis`. `None` for none.

    Returns:
        A tensor like `scores`.
    """
    if mask is not None:
        scores = ops.where(mask, scores, ops.cast(LOWEST, scores.dtype))
    maximum = ops.max(scores, axis=axis, keepdims=True)
    if sink is not None:
        sink = ops.cast(sink, scores.dtype)
        maximum = ops.maximum(maximum, sink)
    weights = ops.exp(scores - maximum)
    if mask is not None:
        weights = ops.where(mask, weights, ops.zeros_like(weights))
    total = ops.sum(weights, axis=axis, keepdims=True)
    if sink is not None:
        total = total + ops.exp(sink - maximum)
    return weights / ops.where(total > 0, total, ops.ones_like(total))
