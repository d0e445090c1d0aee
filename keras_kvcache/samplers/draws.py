"""Draws: `(logits, seed) -> token ids`, the last step of a sampler; and their noise.

The noise depends on a row's key, which is its own seed and step, and on the token.
Without keys a row's place is part of its seed. `keras.random` won't do: its PyTorch
backend adds the two words of a seed, so that step 1 of seed 7 repeats step 0 of seed 8,
and nothing promises that a row's noise stays the same when the batch around it changes.
A counter-based generator gives both by construction, the same on every backend, and
compiled by XLA for a CPU it is faster than `jax.random`.
"""

import numbers
from typing import Any

import numpy as np
from keras import ops

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def seed_words(seed: Any) -> tuple[Any, Any]:
    """Returns a seed as the two 32-bit words of a generator key.

    Args:
        seed: An int of up to 64 bits, or two integers `(seed, step)`: a tensor
            of shape `(2,)`, usually `uint32`, which may be traced.

    Returns:
        Two int32 scalars holding the words' bits.

    Raises:
        ValueError: `seed` is neither an int nor two integers.
    """
    if isinstance(seed, numbers.Integral):
        seed = int(seed)
        seed = np.array([seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF], "uint32")
    words = ops.cast(ops.convert_to_tensor(seed, "uint32"), "int32")
    if tuple(words.shape) != (2,):
        raise ValueError(
            "`seed` must be an int or two integers (seed, step). "
            f"Received: a tensor of shape {tuple(words.shape)}"
        )
    return words[0], words[1]


def threefry(key: tuple[Any, Any], counter: tuple[Any, Any]) -> tuple[Any, Any]:
    """Threefry-2x32 with 20 rounds: a pair of random words for each counter.

    A keyed bijection of 64-bit counters whose outputs pass the BigCrush tests:
    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011). Words
    are int32 tensors whose additions wrap, because that is the one 32-bit type
    with arithmetic on every backend.

    Args:
        key: Two int32 tensors, scalar or broadcastable with `counter`.
        counter: Two int32 tensors of broadcastable shapes.

    Returns:
        Two int32 tensors of the broadcast shape.
    """
    key = (*key, ops.bitwise_xor(ops.bitwise_xor(key[0], key[1]), _PARITY))
    first, second = counter[0] + key[0], counter[1] + key[1]
    for group in range(5):
        for distance in _ROTATIONS[group % 2]:
            first = first + second
            second = ops.bitwise_xor(_rotate_left(second, distance), first)
        first = first + key[(group + 1) % 3]
        second = second + key[(group + 2) % 3] + (group + 1)
    return first, second


def row_keys(seed: Any, num_rows: Any) -> Any:
    """One key a row: the two words of its own seed, and its step.

    Rows that were given one seed together differ in the second word, their number.

    Args:
        seed: An integer or two integers, as in `seed_words`: rows are numbered by their
            places. Or keys, int32 `(B, 3)`, which come back as they are.
        num_rows: Integer (or scalar tensor), `B`.

    Returns:
        An int32 tensor `(B, 3)`.

    Raises:
        ValueError: `seed` is none of these.
    """
    if len(getattr(seed, "shape", ())) == 2:
        return ops.cast(seed, "int32")
    first, step = seed_words(seed)
    number = ops.arange(num_rows, dtype="int32")
    zeros = ops.zeros_like(number)
    return ops.stack([first + zeros, number, step + zeros], axis=1)


def gumbel(seed: Any, num_rows: Any, num_columns: int) -> Any:
    """Standard Gumbel noise, which depends on a row's key alone.

    Args:
        seed: Integer, two integers, or a key a row, as in `row_keys`.
        num_rows: Integer (or scalar tensor), `B`.
        num_columns: Integer, `V`.

    Returns:
        A float32 tensor `(B, V)` of finite values, from -2.9 to 22.2.
    """
    keys = row_keys(seed, num_rows)
    columns = ops.arange((num_columns + 1) // 2, dtype="int32")[None, :]
    pair = threefry((keys[:, :1], keys[:, 2:]), (columns, keys[:, 1:2]))
    bits = ops.concatenate(pair, axis=-1)[:, :num_columns]
    bits = ops.cast(_shift_right(bits, 1), "float32")
    # -log(1 - u) of a u near 0 resolves the large values, which decide the
    # draw, 256 times finer than -log(u) of a u near 1. Neither end is reached,
    # so that no noise is infinite.
    uniform = ops.minimum(bits * 2.0**-31 + 2.0**-32, 1.0 - 2.0**-24)
    return -ops.log(-ops.log1p(-uniform))


def _rotate_left(words, distance):
    return ops.bitwise_or(
        ops.left_shift(words, distance), _shift_right(words, 32 - distance)
    )


def _shift_right(words, distance):
    """A logical right shift; that of int32 is arithmetic and repeats the sign."""
    return ops.bitwise_and(ops.right_shift(words, distance), (1 << (32 - distance)) - 1)


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
