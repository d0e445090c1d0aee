"""Filters: `(logits, parameter) -> logits` with the dropped tokens at -inf.

Each takes logits `(B, V)` of any float dtype and returns float32 ones. The
parameter is a number, a scalar tensor, or one value a row `(B, 1)`, and may be
traced. Rows never see each other, tokens with equal logits are kept or dropped
together, and the most likely token always stays.

None of them sorts: XLA's CPU backend takes 13 ms to sort 49,152 logits, half a
decode step of a small model, and `top_k` needs to know `k` when it compiles.
A filter only needs the smallest logit to keep, and bisection over the bits of
a float finds that exactly in 32 passes over the row, in about 0.5 ms. Call it
inside `jax.jit`: outside, JAX compiles the loop again at each call.
"""

from typing import Any

from keras import ops

_INT32_MIN = -(2**31)


def scale_temperature(logits: Any, temperature: Any) -> Any:
    """Divides by the temperature: below 1 sharpens, above 1 flattens.

    Ackley et al., "A learning algorithm for Boltzmann machines" (1985).

    Args:
        logits: Float tensor `(B, V)`.
        temperature: Number or tensor, above 0.

    Returns:
        A float32 tensor `(B, V)`.
    """
    return ops.cast(logits, "float32") / ops.cast(temperature, "float32")


def keep_top_k(logits: Any, k: Any) -> Any:
    """Keeps the `k` most likely tokens, and those that tie with the last one.

    Fan et al., "Hierarchical neural story generation" (2018).

    Args:
        logits: Float tensor `(B, V)`.
        k: Number or tensor. From `V` on it keeps every token.

    Returns:
        A float32 tensor `(B, V)`.
    """
    logits = ops.cast(logits, "float32")
    k = ops.cast(k, "float32")
    keys = _ordered_keys(logits)

    def enough_kept(threshold):
        count = ops.sum(ops.cast(keys >= threshold, "int32"), -1, keepdims=True)
        # Exact: a vocabulary has fewer than 2**24 tokens.
        return ops.cast(count, "float32") >= k

    return _keep(logits, keys, _largest_threshold(keys, enough_kept))


def keep_top_p(logits: Any, p: Any) -> Any:
    """Keeps the smallest set of most likely tokens whose probability reaches `p`.

    Nucleus sampling: Holtzman et al., "The curious case of neural text
    degeneration" (2019). Probabilities are those of the given logits: after
    another filter, those of the tokens it kept.

    Args:
        logits: Float tensor `(B, V)`.
        p: Number or tensor. From 1 on it keeps every token with a float32
            probability above 0.

    Returns:
        A float32 tensor `(B, V)`.
    """
    logits = ops.cast(logits, "float32")
    keys = _ordered_keys(logits)
    weights = ops.exp(logits - ops.max(logits, axis=-1, keepdims=True))
    # Bounding what is dropped rather than what is kept: a sum over the unlikely
    # tokens doesn't lose them to rounding, so that p=1 drops none of them.
    may_drop = (1.0 - ops.cast(p, "float32")) * ops.sum(weights, -1, keepdims=True)

    def little_dropped(threshold):
        dropped = ops.where(keys < threshold, weights, 0.0)
        return ops.sum(dropped, axis=-1, keepdims=True) <= may_drop

    return _keep(logits, keys, _largest_threshold(keys, little_dropped))


def keep_min_p(logits: Any, p: Any) -> Any:
    """Keeps the tokens at least `p` times as likely as the most likely one.

    Nguyen et al., "Turning up the heat: min-p sampling for creative and
    coherent LLM outputs" (2024).

    Args:
        logits: Float tensor `(B, V)`.
        p: Number or tensor. 0 keeps every token.

    Returns:
        A float32 tensor `(B, V)`.
    """
    logits = ops.cast(logits, "float32")
    best = ops.max(logits, axis=-1, keepdims=True)
    return _keep(logits, logits, best + ops.log(ops.cast(p, "float32")))


def _keep(logits, keys, threshold):
    # A parameter out of range must not drop the most likely token.
    threshold = ops.minimum(threshold, ops.max(keys, axis=-1, keepdims=True))
    return ops.where(keys >= threshold, logits, -float("inf"))


def _ordered_keys(values):
    """Maps float32 to int32 so that `a < b` exactly when `key(a) < key(b)`.

    Floats are stored as sign and magnitude, ints as two's complement; beyond
    that their bits already sort alike. The two zeros get one key.
    """
    bits = ops.view(values, dtype="int32")
    return ops.where(bits < 0, _INT32_MIN - bits, bits)


def _largest_threshold(keys, holds):
    """Finds, for each row, the largest int32 for which `holds` is true.

    Args:
        keys: int32 tensor `(B, V)`, read for its batch size only.
        holds: Callable of an int32 tensor `(B, 1)` to a boolean one, true at
            the smallest int32 and false from some value on.

    Returns:
        An int32 tensor `(B, 1)`.
    """
    one = ops.ones((), dtype="int32")

    def set_bit_if_it_holds(i, threshold):
        # The highest bit is the sign: flipping it steps from the smallest
        # int32 to 0. Each further bit steps up by half as much.
        candidate = ops.bitwise_xor(threshold, ops.left_shift(one, 31 - i))
        return ops.where(holds(candidate), candidate, threshold)

    lowest = ops.full_like(keys[:, :1], _INT32_MIN)
    return ops.fori_loop(0, 32, set_bit_if_it_holds, lowest)
