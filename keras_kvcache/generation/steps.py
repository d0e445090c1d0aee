"""The two steps of generation, as pure functions: prefill and decode.

1. `prefill` runs a chunk of the prompts and samples each row's first new token
   where the row's prompt ends.
2. `decode` feeds every row its newest token, samples the next, and goes on until
   a number of steps is made or all rows are done.

Rows are right-padded: token `t` of a prompt goes to slot `t`. What padding
writes lies at or past its row's fill, and decoding overwrites it before anything
may attend it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_kvcache.caches import with_end
from keras_kvcache.ops import announce

# In the place of a token that a finished row doesn't have.
NO_TOKEN = -1


class StepFunctions(NamedTuple):
    """A language model, as generation sees it.

    Attributes:
        step: `(token_ids (B, T), cache, index (B,)) -> (outputs (B, T, …), cache)`.
        logits: `outputs (B, …) -> logits (B, V)`.
    """

    step: Callable
    logits: Callable


class DecodeState(NamedTuple):
    """All that one decode step leaves to the next."""

    cache: Any
    token: Any  # (B,) int32, the newest token of each row, not in the cache yet
    index: Any  # (B,) int32, its position, where it will be written
    done: Any  # (B,) bool, whether the row has ended
    step: Any  # () int32, how many tokens were sampled


class Limits(NamedTuple):
    """What ends a row."""

    end: Any  # (B,) int32, the position past the row's last possible token
    stop_token_ids: Any  # (any,) int32, filled up with NO_TOKEN


def prefill(model, cache, token, token_ids, first, lengths, sampler, seed):
    """Runs one chunk of all prompts.

    Args:
        model: `StepFunctions`.
        cache: What the chunks before this one left.
        token: int32 `(B,)`: first new token of the rows that ended before.
        token_ids: int32 `(B, C)`, right-padded.
        first: int32 `()`, position of the chunk's first token.
        lengths: int32 `(B,)`, length of each prompt.
        sampler: `(logits (B, V), seed) -> ids (B,)`.
        seed: uint32 `(2,)`.

    Returns:
        `(cache, token)`, with the first new token of rows that end in this chunk.
    """
    chunk = ops.shape(token_ids)[1]
    index = ops.zeros_like(lengths) + first
    # Padding must not take the place of entries in caches that reuse their slots.
    outputs, cache = model.step(token_ids, with_end(cache, lengths), index)
    cache = with_end(cache, None)
    last = lengths - 1 - first
    row_end = ops.clip(last, 0, chunk - 1)
    row_end = ops.reshape(row_end, [-1] + [1] * (len(outputs.shape) - 1))
    outputs = ops.squeeze(ops.take_along_axis(outputs, row_end, axis=1), axis=1)
    sampled = _sample(model.logits(outputs), sampler, seed)
    ends_here = ops.logical_and(last >= 0, last < chunk)
    return cache, ops.where(ends_here, sampled, token)


def decode(model, state, limits, sampler, seed, steps, width, channel=None):
    """Decodes up to `steps` tokens a row.

    Args:
        model: `StepFunctions`.
        state: `DecodeState`.
        limits: `Limits`.
        sampler: `(logits (B, V), seed) -> ids (B,)`.
        seed: uint32 `()`; the sampler gets the pair of it and the step.
        steps: int32 `()`, from 1 to `width`.
        width: Columns of the tokens.
        channel: int32 `()`, what each step's tokens are announced to, with a 1 behind
            them once all rows are done, else a 0. Once it is closed no other step is
            made. `None` where programs can't announce.

    Returns:
        `(state, tokens)`, the new tokens int32 `(B, width)`, a column a step;
        `NO_TOKEN` where a row had ended and in columns of steps that weren't made.
    """

    def one_step(loop):
        state, tokens, count, _ = loop
        outputs, cache = model.step(state.token[:, None], state.cache, state.index)
        step_seed = ops.stack([seed, ops.cast(state.step, "uint32")])
        sampled = _sample(model.logits(outputs[:, 0]), sampler, step_seed)
        emitted = ops.where(state.done, NO_TOKEN, sampled)
        # JAX wants both of one dtype, with `jax_enable_x64`, too.
        place = (ops.zeros_like(count), count)
        tokens = ops.slice_update(tokens, place, emitted[:, None])
        # A finished row stands still: it feeds its last token again and again.
        token = ops.where(state.done, state.token, sampled)
        index = state.index + ops.cast(ops.logical_not(state.done), "int32")
        stops = ops.equal(token[:, None], limits.stop_token_ids[None, :])
        ends = ops.logical_or(ops.any(stops, axis=1), index + 1 >= limits.end)
        done = ops.logical_or(state.done, ends)
        state = DecodeState(cache, token, index, done, state.step + 1)
        count, all_done = count + 1, ops.all(done)
        goes_on = ops.logical_and(count < steps, ops.logical_not(all_done))
        if channel is not None:
            message = ops.append(emitted, ops.cast(all_done, "int32"))
            goes_on = ops.logical_and(goes_on, announce(message, channel))
        return state, tokens, count, goes_on

    tokens = ops.full((ops.shape(state.token)[0], width), NO_TOKEN, dtype="int32")
    goes_on = ops.logical_not(ops.all(state.done))
    loop = (state, tokens, ops.zeros((), "int32"), goes_on)
    state, tokens, *_ = _while(lambda loop: loop[-1], one_step, loop)
    return state, tokens


def _sample(logits, sampler, seed):
    """One id a row, int32 `(B,)`, of logits `(B, V)`."""
    token = ops.convert_to_tensor(sampler(logits, seed))
    if tuple(token.shape) != tuple(logits.shape[:1]):
        raise ValueError(
            "`sampler` must give one token id a row, shape (B,) = "
            f"{tuple(logits.shape[:1])}. Received: a tensor of shape "
            f"{tuple(token.shape)}"
        )
    return ops.cast(token, "int32")


def _while(goes_on, body, loop):
    """A loop that JAX compiles and that the other backends run in Python."""
    if keras.backend.backend() == "jax":
        import jax

        return jax.lax.while_loop(goes_on, body, loop)
    while goes_on(loop):
        loop = body(loop)
    return loop
