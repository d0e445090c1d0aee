"""Samplers with state, and those without one called in the same way.

A sampler with state is an object with two methods:

- `start(rows) -> state`: the state that rows begin with, a pytree of arrays whose
  axis 0 is the rows. `rows` is a `keras_kvcache.generation.Rows`, the prompts in it.
- `__call__(logits (B, V), state, key (B, 3)) -> (ids (B,), state)`: the next token of
  each row. A key holds a row's own seed and step; the draws of this package take it.
  A sampler that searches has `moves_rows = True` and gives `(ids, state, parents)`:
  row `b` goes on from what row `parents[b]` has read, int32 `(B,)`, and `state` is in
  that order already. A row and its parent must have one prompt. It doesn't learn which
  rows met a stop id: search without stop ids, and end a row by the id `NO_TOKEN`.

Any other sampler has the state `()`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import keras
import numpy as np
from keras import ops

from keras_kvcache.samplers.draws import categorical, most_likely
from keras_kvcache.samplers.sampler import Sampler

# In the place of a token that a row doesn't have.
NO_TOKEN = -1

# Draws that take a key a row.
KEYED = (categorical, most_likely)

# Spreads the numbers of rows over all seeds; row 0 keeps its seed as it is.
_SPREAD = 0x9E3779B1


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=[], meta_fields=["sampler"]
)
@dataclasses.dataclass(frozen=True)
class Constant:
    """A sampler with state that isn't a pytree: a constant of compiled programs.

    Each new object compiles anew. Registered as a pytree, its arrays are data.

    Attributes:
        sampler: Hashable, as functions and plain objects are.
    """

    sampler: object

    @property
    def moves_rows(self) -> bool:
        """Whether the sampler gives parents."""
        return moves_rows(self.sampler)

    def start(self, rows: Any) -> Any:
        """The state that rows begin with."""
        return self.sampler.start(rows)

    def __call__(self, logits, state, key):
        """The next token of each row."""
        return self.sampler(logits, state, key)


def has_state(sampler: Any) -> bool:
    """Whether a sampler takes and gives a state."""
    return callable(getattr(sampler, "start", None))


def moves_rows(sampler: Any) -> bool:
    """Whether a sampler searches: it gives the row that each row goes on from."""
    return bool(getattr(sampler, "moves_rows", False))


def start(sampler: Any, rows: Any) -> Any:
    """The state that `rows` begin with; `()` for a sampler without one.

    An array that it has twice is copied, as programs donate each only once.
    """
    leaves, structure = jax.tree_util.tree_flatten(
        sampler.start(rows) if has_state(sampler) else ()
    )
    seen = set()
    for place, leaf in enumerate(leaves):
        if id(leaf) in seen and ops.is_tensor(leaf):
            leaves[place] = ops.copy(leaf)
        seen.add(id(leaf))
    return jax.tree_util.tree_unflatten(structure, leaves)


def sample(sampler: Any, logits: Any, state: Any, key: Any) -> tuple[Any, Any, Any]:
    """Samples with any sampler, in the form of those with state.

    Args:
        sampler: What `samplers.get` gives.
        logits: Float tensor `(B, V)`.
        state: Of the sampler.
        key: int32 `(B, 3)`, a row's seed and step.

    Returns:
        `(ids, state, parents)`: the ids int32 `(B,)`; `parents` is int32 `(B,)`, or
        `None` where rows stay where they are.

    Raises:
        ValueError: The sampler doesn't give one id a row, or parents unless it moves
            rows.
    """
    parents = None
    if has_state(sampler):
        chosen = sampler(logits, state, key)
        if len(chosen) != (3 if moves_rows(sampler) else 2):
            raise ValueError(
                "`sampler` must give (ids, state, parents) if its `moves_rows` is "
                f"true, else (ids, state). Received: {len(chosen)} values, and "
                f"moves_rows={moves_rows(sampler)}"
            )
        ids, state, *rest = chosen
        if rest:
            parents = ops.cast(rest[0], "int32")
    elif isinstance(sampler, Sampler) and sampler.draw in KEYED:
        ids = sampler(logits, key)
    elif isinstance(sampler, Sampler):
        ids = row_by_row(sampler.draw, sampler.filter(logits), key)
    else:
        ids = row_by_row(sampler, logits, key)
    ids = ops.convert_to_tensor(ids)
    if tuple(ids.shape) != tuple(logits.shape[:1]):
        raise ValueError(
            "`sampler` must give one token id a row, shape (B,) = "
            f"{tuple(logits.shape[:1])}. Received: a tensor of shape "
            f"{tuple(ids.shape)}"
        )
    return ops.cast(ids, "int32"), state, parents


def row_by_row(sample: Callable[..., Any], logits: Any, key: Any) -> Any:
    """Calls a function of `(logits, seed)` for each row alone.

    So a draw doesn't depend on a row's place in the batch.

    Args:
        sample: Function of logits `(1, V)` and of a seed, uint32 `(2,)`.
        logits: Float tensor `(B, V)`.
        key: int32 `(B, 3)`.

    Returns:
        The results of all rows, concatenated.
    """
    if keras.backend.backend() == "jax":
        seeds = _seeds(ops.cast(key, "uint32"), jax.numpy)
        each = jax.vmap(lambda row, seed: sample(row[None], seed))
        ids = each(logits, seeds)
        return ops.reshape(ids, (-1, *ids.shape[2:]))
    # Eager: seeds are numbers, as PyTorch has next to no arithmetic of uint32.
    seeds = _seeds(ops.convert_to_numpy(key).astype("uint32"), np)
    ids = [
        sample(logits[row : row + 1], ops.convert_to_tensor(seed))
        for row, seed in enumerate(seeds)
    ]
    return ops.concatenate([ops.convert_to_tensor(each) for each in ids], axis=0)


def _seeds(keys, numpy):
    """Keys `(B, 3)` as pairs of a seed and a step, uint32 `(B, 2)`."""
    seed = keys[:, 0] + keys[:, 1] * numpy.uint32(_SPREAD)
    return numpy.stack([seed, keys[:, 2]], axis=1)
