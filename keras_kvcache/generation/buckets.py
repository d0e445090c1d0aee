"""The few sizes that programs are compiled for, and caches that grow through them."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import jax
import numpy as np
from keras import ops

from keras_kvcache.caches.segmentation import segment_sizes
from keras_kvcache.generation.rows import NO_TOKEN, Rows

# A prompt is run in chunks of these sizes, so that prompts of all lengths need
# three programs.
CHUNKS = (32, 128, 512)

# Caches have 256, 512, 1024, 2048, 3072, 4096, 6144, … slots. Larger steps would waste
# memory, and time once filled; smaller ones aren't worth a program each.
SMALLEST_CAPACITY = 256
LARGEST_DOUBLED = 2048

# Up to this many new tokens have slots from the start.
MOST_AT_ONCE = 1024
# If there may be more, caches begin with slots for at least this many, as most answers
# are short: slots take time to allocate, and programs that read many segments take time
# to compile.
FEWEST_AT_FIRST = 128


def capacity_for(length: int, limit: int | None = None) -> int:
    """Slots for `length` tokens: the next size, at most `limit` if there is one."""
    capacity = SMALLEST_CAPACITY
    while capacity < length:
        capacity *= 2
    if capacity > LARGEST_DOUBLED and length <= capacity * 3 // 4:
        capacity = capacity * 3 // 4
    return capacity if limit is None else min(capacity, limit)


def chunk_sizes(length: int) -> list[int]:
    """Cuts a prompt of `length` tokens.

    The last chunk may reach past the prompt. At most half of it does, except in the
    smallest: more would cost more than the chunks that it saves.

    Returns:
        A list of sizes from `CHUNKS` whose sum is at least `length`.
    """
    sizes, rest = [], length
    while rest > 0:
        covering = [size for size in CHUNKS if size >= rest]
        if covering and (covering[0] < 2 * rest or covering[0] == CHUNKS[0]):
            size = covering[0]
        else:
            size = max(size for size in CHUNKS if size <= rest)
        sizes.append(size)
        rest -= size
    return sizes


def growing_capacities(
    length: int, end: int, limit: int | None = None
) -> tuple[int, ...]:
    """The capacities that caches have, one after the other.

    Each is where a segment ends (256, 1024, 2048, 4096, …), so that growing adds
    segments and copies nothing.

    Args:
        length: Tokens of the longest prompt.
        end: The position past the last possible token of all rows.
        limit: The most slots, or `None`.

    Returns:
        A tuple of increasing integers; the last is enough for `end`.
    """
    last = capacity_for(end, limit)
    if end - length <= MOST_AT_ONCE:
        return (last,)
    ends = itertools.accumulate(segment_sizes(last, kernels_read=False))
    at_first = length + FEWEST_AT_FIRST
    return tuple(slots for slots in ends if slots >= at_first or slots == last)


class Growth:
    """Gives caches more slots before a burst that would not fit.

    Args:
        resize: `(cache, capacity, fill) -> cache`.
        capacities: How many slots the caches have now, and will have.
        fill: Slots that hold tokens, of the fullest row.
    """

    def __init__(self, resize: Callable, capacities: Sequence[int], fill: int) -> None:
        self._resize = resize
        self._capacity, *self._larger = capacities
        self._fill = fill

    def has_room(self, steps: int) -> bool:
        """Whether so many steps fit without growing."""
        return not self._larger or self._fill + steps <= self._capacity

    def grow(self, rows: Rows) -> Rows:
        """`Rows` with the next number of slots, and a column for each token."""
        self._capacity = self._larger.pop(0)
        cache = self._resize(rows.cache, self._capacity, self._fill)
        if _shapes(cache) == _shapes(rows.cache):
            # All of it rolls: the newest tokens are enough.
            return replace(rows, cache=cache)
        width = max(self._capacity, rows.tokens.shape[1])
        return with_columns(replace(rows, cache=cache), width)

    def advance(self, steps: int) -> None:
        """Counts steps that were made; rows may have stopped before."""
        self._fill += steps


def with_columns(rows: Rows, width: int) -> Rows:
    """Gives `Rows.tokens` another number of columns.

    Raises:
        ValueError: A row has more tokens, or has lost its first ones already.
    """
    tokens, index = map(ops.convert_to_numpy, (rows.tokens, rows.index))
    longest = int(index.max()) + 1
    if longest > min(width, tokens.shape[1]):
        raise ValueError(
            "`capacity` must be enough for all tokens of the rows, which must be there "
            f"still. Received: {width} for {longest} tokens, of which "
            f"{min(longest, tokens.shape[1])} are there"
        )
    added = max(0, width - tokens.shape[1])
    tokens = np.pad(tokens[:, :width], [(0, 0), (0, added)], constant_values=NO_TOKEN)
    return replace(rows, tokens=ops.convert_to_tensor(tokens))


def _shapes(tree):
    return [array.shape for array in jax.tree_util.tree_leaves(tree)]
