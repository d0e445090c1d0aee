"""Draws: `(logits, seed) -> token ids`, the last step of a sampler."""

from typing import Any

from keras import ops

from keras_kvcache.samplers.noise import gumbel


def most_likely(logits: Any, seed: Any) -> Any:
    """Takes the most likely token, the first one of those that tie.

    Args:
        logits: Float tensor `(B, V)`.
        seed: Not used; there so that all draws are called alike.

    Returns:
        Token ids, an int32 tensor `(B,)`.
    """
    return ops.cast(ops.argmax(logits, axis=-1), "int32")


def categorical(logits: Any, seed: Any) -> Any:
    """Draws each token with its probability, softmax of the logits.

    By the Gumbel-max trick, which needs no normalised probabilities: Maddison
    et al., "A* sampling" (2014).

    Args:
        logits: Float tensor `(B, V)`; -inf is never drawn.
        seed: Integer, or two integers `(seed, step)`, traced or not; a row's noise is
            that of its place then. Or a key a row, int32 `(B, 3)`, which makes a
            row's draw the same in any place and company.

    Returns:
        Token ids, an int32 tensor `(B,)`.
    """
    num_rows, num_tokens = ops.shape(logits)
    noisy = ops.cast(logits, "float32") + gumbel(seed, num_rows, num_tokens)
    # Not `argmax`: XLA's CPU backend computes the noise inside that reduction,
    # one value at a time, and takes five times as long.
    return ops.cast(ops.top_k(noisy, 1)[1][:, 0], "int32")
