"""Programs that run rows: prompts chunk by chunk, then bursts of decode steps."""

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np
from keras import ops

from keras_kvcache.caches import batch_size
from keras_kvcache.generation.buckets import (
    CHUNKS,
    SMALLEST_CAPACITY,
    Growth,
    with_columns,
)
from keras_kvcache.generation.multi_step import LONGEST_BURST, make_reader
from keras_kvcache.generation.program import make_program
from keras_kvcache.generation.prompts import padded_chunks
from keras_kvcache.generation.rows import NO_TOKEN, Rows, start_rows
from keras_kvcache.generation.steps import decode, extend, prefill
from keras_kvcache.runtime.concrete import is_integer

# The most columns that `Rows.tokens` begins with: 4 MB a row.
MOST_TOKENS = 2**20


class Plan(NamedTuple):
    """The checked arguments of one call of `generate`.

    Attributes:
        prompts: Tuple of int32 arrays, one a row.
        ends: int32 `(B,)`, as `Rows.end`.
        stop_token_ids: Tuple of ids.
        sampler: What `samplers.get` gives.
        seed: uint32 number.
        cache: Dictionary of `kind`, `codec` and `layout`, as far as they were given.
    """

    prompts: tuple
    ends: np.ndarray
    stop_token_ids: tuple
    sampler: Any
    seed: np.uint32
    cache: dict


class Engine:
    """A model's programs of generation, and the calls of them.

    Args:
        model, init_cache, resize_cache: As in `keras_kvcache.Generator`.
        functions: `StepFunctions`.

    Attributes:
        model, resize_cache, functions: As above.
    """

    def __init__(
        self,
        model: Any,
        functions: Any,
        init_cache: Callable,
        resize_cache: Callable | None = None,
    ) -> None:
        self.model, self.resize_cache = model, resize_cache
        self.functions, self._init_cache = functions, init_cache
        self._prefill = make_program(self._run_prefill, model, donate=("rows",))
        self._decode = make_program(self._run_decode, model, donate=("rows",))
        self._extend = make_program(self._run_extend, model, donate=("cache",))

    def _run_prefill(self, **arguments):
        return prefill(self.functions, **arguments)

    def _run_decode(self, **arguments):
        return decode(self.functions, width=LONGEST_BURST, **arguments)

    def _run_extend(self, **arguments):
        return extend(self.functions, **arguments)

    def with_init_cache(self, init_cache: Callable) -> "Engine":
        """The same programs on other caches."""
        other = copy.copy(self)
        other._init_cache = init_cache
        return other

    def _build(self):
        """Lets a model that was never called make its weights.

        Weights made during tracing would be tracers, of no use afterwards.
        """
        model = self.model
        if model.built and all(layer.built for layer in model.layers):
            return
        cache = self._init_cache(1, SMALLEST_CAPACITY)
        token_ids, index = ops.zeros((1, 1), "int32"), ops.zeros((1,), "int32")
        outputs, _ = self.functions.step(token_ids, cache, index)
        self.functions.logits(outputs[:, 0])

    def init_cache(self, batch_size: int, capacity: int, **options: Any) -> Any:
        """As in `keras_kvcache.Generator`."""
        if options:
            try:
                signature = inspect.signature(self._init_cache)
                signature.bind(batch_size, capacity, **options)
            except TypeError as error:
                raise ValueError(
                    "`cache` needs an `init_cache` that takes its options. Received: "
                    f"{options}: {error}"
                ) from error
        return self._init_cache(batch_size, capacity, **options)

    def start(
        self, plan: Plan, capacities: Sequence[int]
    ) -> tuple[Rows, np.ndarray, bool]:
        """Runs the prompts of a `Plan`.

        Args:
            plan: `Plan`.
            capacities: How many slots the caches have now, and will have.

        Returns:
            `(rows, emitted, all_done)`, as `prefill` gives them.
        """
        self._build()
        at_first = {"room": capacities[0]} if len(capacities) > 1 else {}
        batch = len(plan.prompts)
        cache = self.init_cache(batch, capacities[-1], **plan.cache, **at_first)
        rows = start_rows(
            cache,
            plan.prompts,
            plan.ends,
            plan.stop_token_ids,
            plan.seed,
            plan.sampler,
            min(capacities[0], MOST_TOKENS),
        )
        emitted = all_done = None
        for first, token_ids in padded_chunks(plan.prompts):
            rows, emitted, all_done = self._prefill(
                rows=rows,
                token_ids=token_ids,
                index=np.full(batch, first, "int32"),
                sampler=plan.sampler,
            )
        return rows, ops.convert_to_numpy(emitted), bool(all_done)

    def decode(
        self, rows: Rows, steps: Any, sampler: Callable
    ) -> tuple[Rows, np.ndarray]:
        """Goes on with rows, as in `keras_kvcache.Generator`."""
        if not is_integer(steps) or steps < 1:
            raise ValueError(f"`steps` must be a positive integer. Received: {steps!r}")
        self._build()
        columns = []
        channel = make_reader(rows.index.shape[0], streams=False).channel
        for first in range(0, steps, LONGEST_BURST):
            count = min(LONGEST_BURST, steps - first)
            rows, tokens = self._decode(
                rows=rows, sampler=sampler, steps=np.int32(count), channel=channel
            )
            columns.append(ops.convert_to_numpy(tokens)[:, :count])
        return rows, np.concatenate(columns, axis=1)

    def resize(self, rows: Rows, capacity: int) -> Rows:
        """Gives rows more or fewer slots, as in `keras_kvcache.Generator`."""
        if self.resize_cache is None:
            raise ValueError(
                "`resize_cache` must be given to the `Generator` to resize rows. "
                "Received: None"
            )
        index = ops.convert_to_numpy(rows.index)
        cache = self.resize_cache(rows.cache, capacity, index)
        return with_columns(replace(rows, cache=cache), min(capacity, MOST_TOKENS))

    def extend(self, **arguments: Any) -> tuple[Any, Any]:
        """Runs tokens, as in `keras_kvcache.Generator`."""
        self._build()
        return self._extend(**arguments)

    def bursts(
        self, plan: Plan, capacities: Sequence[int], streams: bool = False
    ) -> Iterator[np.ndarray]:
        """Iterates over the new tokens of a `Plan`.

        Args:
            plan, capacities: As in `start`.
            streams: Whether each token is wanted at once.

        Yields:
            int32 arrays `(B, any)`, `NO_TOKEN` for rows that have ended.
        """
        rows, emitted, all_done = self.start(plan, capacities)
        yield emitted[:, None]
        if all_done:
            return
        # While the caller looks at one burst the next one is computed, at worst for
        # nothing, unless caches must grow for it.
        reader = make_reader(len(plan.prompts), streams)
        longest = max(len(prompt) for prompt in plan.prompts)
        try:
            decode_burst = self._decode.bind(
                sampler=plan.sampler,
                steps=np.int32(reader.steps),
                channel=reader.channel,
            )
            growth = Growth(self.resize_cache, capacities, longest)
            rows, tokens = decode_burst(rows=rows)
            growth.advance(reader.steps)
            while True:
                following = None
                if growth.has_room(reader.steps):
                    rows, following = decode_burst(rows=rows)
                yield from reader.read(tokens)
                last = ops.convert_to_numpy(tokens)[:, reader.steps - 1]
                if (last == NO_TOKEN).all():
                    return
                if following is None:
                    rows = growth.grow(rows)
                    rows, following = decode_burst(rows=rows)
                growth.advance(reader.steps)
                tokens = following
        finally:
            reader.close()

    def write(self, plan: Plan, capacities: Sequence[int]) -> list[list[int]]:
        """Runs to its end a `Plan` whose sampler moves rows.

        What such a sampler gave a row before may be another row's by now, so answers
        are read from the rows at last.

        Args:
            plan, capacities: As in `start`.

        Returns:
            A list of new ids for each row.
        """
        rows, _, all_done = self.start(plan, capacities[-1:])
        while not all_done:
            rows, _ = self.decode(rows, LONGEST_BURST, plan.sampler)
            all_done = ops.convert_to_numpy(rows.done).all()
        tokens, index = map(ops.convert_to_numpy, (rows.tokens, rows.index))
        return [
            row[np.arange(len(prompt), last + 1) % len(row)].tolist()
            for prompt, row, last in zip(plan.prompts, tokens, index, strict=True)
        ]

    def lower(self, cache: Any, chunk: int | None, sampler: Any, sharding: Any) -> Any:
        """As in `keras_kvcache.Generator`."""
        self._build()
        batch = batch_size(cache)
        prompts = np.zeros((batch, 1), "int32")
        width = CHUNKS[-1]
        rows = start_rows(cache, prompts, prompts[:, 0] + 2, (), 0, sampler, width)
        if chunk is None:
            channel = make_reader(batch, streams=False).channel
            arguments = dict(steps=np.int32(LONGEST_BURST), channel=channel)
        else:
            token_ids = np.zeros((batch, chunk), "int32")
            arguments = dict(token_ids=token_ids, index=np.zeros(batch, "int32"))
        arguments = dict(rows=rows, sampler=sampler, **arguments)
        if sharding is not None:

            def place(leaf):
                if not hasattr(leaf, "shape"):
                    return leaf
                return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

            arguments = jax.tree_util.tree_map(place, arguments)
        program = self._decode if chunk is None else self._prefill
        return program.lower(**arguments)
