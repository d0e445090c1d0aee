"""Rows of generation: all that a row has, in one pytree."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from keras import ops

from keras_kvcache.samplers import stateful
from keras_kvcache.samplers.stateful import NO_TOKEN


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False, repr=False)
class Rows:
    """The state of generation of `B` rows: cache, tokens, limits, seeds and steps.

    It's immutable, and axis 0 of every array is the rows. So the functions of
    `keras_kvcache.caches` for rows (`take_rows`, `insert_rows`, `join_rows`, …) take,
    place and repeat rows, and each goes on with the tokens that it would have had.

    A row's newest token is at `index` and not in the cache yet: the next step writes
    its keys and values there.

    Attributes:
        cache: Keys and values of the tokens before `index`; what `init_cache` gives.
        tokens: int32 `(B, C)`, prompt and answer up to now: the token at position `p`
            in column `p % C`, so that a text without end keeps its newest `C` tokens.
        index: int32 `(B,)`, position of the newest token.
        end: int32 `(B,)`, the budget: the position past the row's last possible token.
        stop_token_ids: int32 `(B, any)`, ids that end the row, filled up with
            `NO_TOKEN`.
        seed: int32 `(B, 2)`, 64 bits that are the row's own.
        step: int32 `(B,)`, how many tokens were chosen.
        sampler: The sampler's state, a pytree.
        done: bool `(B,)`, whether the row has ended.
    """

    cache: Any
    tokens: Any
    index: Any
    end: Any
    stop_token_ids: Any
    seed: Any
    step: Any
    sampler: Any
    done: Any

    def __repr__(self):
        return f"<Rows, B={self.index.shape[0]}, C={self.tokens.shape[1]}>"

    @property
    def newest(self) -> Any:
        """int32 `(B, 1)`, each row's newest token."""
        column = ops.mod(self.index, self.tokens.shape[1])
        return ops.take_along_axis(self.tokens, column[:, None], axis=1)

    @property
    def key(self) -> Any:
        """int32 `(B, 3)`: each row's seed and step, by which its noise is drawn."""
        return ops.concatenate([self.seed, self.step[:, None]], axis=1)


def padded_stop_ids(stop_token_ids: Sequence[int]) -> np.ndarray:
    """Stop ids, int32, filled up with `NO_TOKEN` to one of a few sizes.

    So the number of stop ids compiles nothing.
    """
    size = max(8, 1 << len(stop_token_ids).bit_length())
    padded = np.full(size, NO_TOKEN, "int32")
    padded[: len(stop_token_ids)] = stop_token_ids
    return padded


def start_rows(
    cache: Any,
    prompts: Any,
    ends: Sequence[int],
    stop_token_ids: Any,
    seed: Any,
    sampler: Any,
    width: int,
) -> Rows:
    """Rows that have a prompt each, of which nothing is in the cache.

    Args:
        cache: An empty cache, of `B` rows.
        prompts: One int32 array a row.
        ends: int32 `(B,)`, as `Rows.end`. A row without room for a token is done.
        stop_token_ids: Ids that end a row, the same for all.
        seed: uint32 number; row `r` has the seed `(seed, r)`.
        sampler: What `samplers.get` gives.
        width: `C`.

    Returns:
        `Rows` of NumPy arrays, apart from the cache and the sampler's state.
    """
    lengths = np.array([len(prompt) for prompt in prompts], "int32")
    width, batch = max(width, int(lengths.max())), len(prompts)
    tokens = np.full((batch, width), NO_TOKEN, "int32")
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    numbers = np.arange(batch, dtype="uint32")
    seeds = np.stack([np.full_like(numbers, seed), numbers], axis=1)
    rows = Rows(
        cache=cache,
        tokens=tokens,
        index=lengths - 1,
        end=np.asarray(ends, "int32"),
        stop_token_ids=np.tile(padded_stop_ids(stop_token_ids), (batch, 1)),
        seed=seeds.view("int32"),
        step=np.zeros(batch, "int32"),
        sampler=(),
        done=lengths >= ends,
    )
    return replace(rows, sampler=stateful.start(sampler, rows))
