"""Generation as pure functions of rows.

1. `extend` runs tokens, at an index of each row, and gives the logits of its last one.
2. `choose` makes tokens of logits by a sampler, which may have a state.
3. `advance` gives each row its token and ends the rows that are to end.
4. `decode`, the loop, does the three until a number of steps is made or all rows are
   done. `prefill` does them for a chunk of prompts.

Rows are right-padded: token `t` of a prompt has position `t`. In a static cache later
tokens overwrite what padding wrote before anything may attend it; rolling caches, and
codecs that code groups of tokens, drop it (`with_end`).
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import keras
from keras import ops

from keras_kvcache.attention import splice
from keras_kvcache.caches import take_rows, with_end
from keras_kvcache.generation.rows import NO_TOKEN, Rows
from keras_kvcache.runtime.channel import announce
from keras_kvcache.samplers import stateful


class StepFunctions(NamedTuple):
    """A language model, as generation sees it.

    Attributes:
        step: `(token_ids (B, T), cache, index (B,)) -> (outputs (B, T, …), cache)`.
        logits: `outputs (B, …) -> logits (B, V)`.
    """

    step: Callable
    logits: Callable


def extend(
    model: StepFunctions, cache: Any, token_ids: Any, index: Any, lengths: Any = None
) -> tuple[Any, Any]:
    """Runs tokens of all rows and gives the logits after each row's last one.

    Args:
        model: `StepFunctions`.
        cache: What earlier calls left, of `B` rows.
        token_ids: int32 `(B, T)`, right-padded.
        index: int32 `(B,)`, position of each row's first token here.
        lengths: int32 `(B,)`, how many of the tokens are each row's; the rest is
            padding, which nothing ever attends. The logits of a row without tokens mean
            nothing. `None` for `T` each.

    Returns:
        `(cache, logits (B, V))`.
    """
    if lengths is None:
        outputs, cache = model.step(token_ids, cache, index)
        return cache, model.logits(outputs[:, -1])
    # Padding must not take the place of entries in caches that reuse their slots.
    outputs, cache = model.step(token_ids, with_end(cache, index + lengths), index)
    cache = with_end(cache, None)
    last = ops.clip(lengths - 1, 0, ops.shape(token_ids)[1] - 1)
    last = ops.reshape(last, [-1] + [1] * (len(outputs.shape) - 1))
    outputs = ops.squeeze(ops.take_along_axis(outputs, last, axis=1), axis=1)
    return cache, model.logits(outputs)


def choose(
    sampler: Callable, logits: Any, state: Any, key: Any
) -> tuple[Any, Any, Any]:
    """Chooses the next token of each row.

    Args:
        sampler: What `samplers.get` gives, with or without a state.
        logits: float `(B, V)`.
        state: The sampler's state, `Rows.sampler`.
        key: int32 `(B, 3)`, `Rows.key`.

    Returns:
        `(ids, state, parents)`: int32 `(B,)`, the next state, and the row that each row
        goes on from, int32 `(B,)`; `None` where rows stay in their places.

    Raises:
        ValueError: The sampler doesn't give one id a row.
    """
    return stateful.sample(sampler, logits, state, key)


def advance(
    rows: Rows, ids: Any, state: Any = (), parents: Any = None, is_ready: Any = None
) -> tuple[Rows, Any]:
    """Gives rows their next tokens and ends those that are to end.

    Args:
        rows: `Rows`, their cache as `extend` left it. A row that is done stands still.
        ids, state: As `choose` gives them.
        parents: As `choose` gives it: row `b` goes on from the cache, the tokens, the
            index and `done` of row `parents[b]`; budget, stop ids, seed and step stay.
            The id `NO_TOKEN` then ends a row where it is.
        is_ready: bool `(B,)`, which rows have a token at all; `None` for all.

    Returns:
        `(rows, emitted)`: the new `Rows`, and the new tokens, int32 `(B,)`, `NO_TOKEN`
        for rows that got none.
    """
    # A row without a budget, as `reset_rows` leaves one, is over before it begins.
    is_over = ops.logical_or(rows.done, rows.index + 1 >= rows.end)
    goes_on = ops.logical_not(is_over)
    if is_ready is not None:
        goes_on = ops.logical_and(goes_on, is_ready)
    if parents is None:
        state = _of_rows(goes_on, state, rows.sampler)
    else:
        if is_ready is not None:
            places = ops.arange(parents.shape[0], dtype="int32")
            parents = ops.where(is_ready, parents, places)
            state = _of_rows(is_ready, state, rows.sampler)
        moved = (rows.cache, rows.tokens, rows.index, rows.done)
        cache, tokens, index, done = take_rows(moved, parents)
        rows = replace(rows, cache=cache, tokens=tokens, index=index, done=done)
        is_ended = ops.equal(ids, NO_TOKEN)
        rows = replace(rows, done=ops.logical_or(rows.done, is_ended))
        goes_on = ops.take(goes_on, parents, axis=0)
        goes_on = ops.logical_and(goes_on, ops.logical_not(is_ended))
    moves = ops.cast(goes_on, "int32")
    index, width = rows.index + moves, rows.tokens.shape[1]
    token = ops.where(goes_on[:, None], ids[:, None], rows.newest)
    stops = ops.any(ops.equal(token, rows.stop_token_ids), axis=1)
    ends = ops.logical_or(ops.logical_and(goes_on, stops), index + 1 >= rows.end)
    rows = replace(
        rows,
        tokens=splice(rows.tokens, token, ops.mod(index, width), axis=1),
        index=index,
        step=rows.step + moves,
        sampler=state,
        done=ops.logical_or(rows.done, ends),
    )
    return rows, ops.where(goes_on, ids, NO_TOKEN)


def prefill(
    model: StepFunctions, rows: Rows, token_ids: Any, index: Any, sampler: Callable
) -> tuple[Rows, Any, Any]:
    """Runs one chunk of all prompts, and chooses for the rows whose prompts end in it.

    Args:
        model: `StepFunctions`.
        rows: `Rows` that have chosen nothing yet; the newest token is the prompt's
            last.
        token_ids: int32 `(B, T)`, right-padded.
        index: int32 `(B,)`, position of each row's first token here.
        sampler: What `samplers.get` gives.

    Returns:
        `(rows, emitted, all_done)`: the rows; int32 `(B,)`, the first token of every
        row that has one by now, `NO_TOKEN` for the others; and whether all are done.
    """
    lengths = ops.where(rows.step > 0, 0, rows.index + 1 - index)
    cache, logits = extend(model, rows.cache, token_ids, index, lengths)
    is_ready = ops.logical_and(lengths > 0, lengths <= ops.shape(token_ids)[1])
    ids, state, parents = choose(sampler, logits, rows.sampler, rows.key)
    rows = replace(rows, cache=cache)
    rows, _ = advance(rows, ids, state, parents, is_ready)
    emitted = ops.where(rows.step > 0, rows.newest[:, 0], NO_TOKEN)
    return rows, emitted, ops.all(rows.done)


def decode(
    model: StepFunctions,
    rows: Rows,
    sampler: Callable,
    steps: Any,
    width: int,
    channel: Any = None,
) -> tuple[Rows, Any]:
    """Decodes up to `steps` tokens a row.

    Args:
        model: `StepFunctions`.
        rows: `Rows`.
        sampler: What `samplers.get` gives.
        steps: int32 `()`, from 1 to `width`.
        width: Columns of the tokens.
        channel: int32 `()`, the channel that gets each step's tokens, followed by 1 if
            all rows are done, else 0. Once it is closed no other step is made. `None`
            where programs can't announce.

    Returns:
        `(rows, tokens)`, the new tokens int32 `(B, width)`, a column a step;
        `NO_TOKEN` where a row had ended and in columns of steps that weren't made.
    """

    def one_step(loop):
        rows, tokens, count, _ = loop
        # A finished row stands still: it feeds its last token again and again.
        cache, logits = extend(model, rows.cache, rows.newest, rows.index)
        ids, state, parents = choose(sampler, logits, rows.sampler, rows.key)
        rows = replace(rows, cache=cache)
        rows, emitted = advance(rows, ids, state, parents)
        # JAX wants both of one dtype, with `jax_enable_x64`, too.
        place = (ops.zeros_like(count), count)
        tokens = ops.slice_update(tokens, place, emitted[:, None])
        count, all_done = count + 1, ops.all(rows.done)
        goes_on = ops.logical_and(count < steps, ops.logical_not(all_done))
        if channel is not None:
            message = ops.append(emitted, ops.cast(all_done, "int32"))
            goes_on = ops.logical_and(goes_on, announce(message, channel))
        return rows, tokens, count, goes_on

    tokens = ops.full((ops.shape(rows.index)[0], width), NO_TOKEN, dtype="int32")
    goes_on = ops.logical_not(ops.all(rows.done))
    loop = (rows, tokens, ops.zeros((), "int32"), goes_on)
    rows, tokens, *_ = _while(lambda loop: loop[-1], one_step, loop)
    return rows, tokens


def _of_rows(predicate, state, other):
    """A pytree of arrays that is `state` in rows where a predicate holds."""

    def select(array, other):
        shape = [-1] + [1] * (len(array.shape) - 1)
        return ops.where(ops.reshape(predicate, shape), array, other)

    return jax.tree_util.tree_map(select, state, other)


def _while(goes_on, body, loop):
    """A loop that JAX compiles and that the other backends run in Python."""
    if keras.backend.backend() == "jax":
        return jax.lax.while_loop(goes_on, body, loop)
    while goes_on(loop):
        loop = body(loop)
    return loop
