"""Generation from any Keras model built with caches."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from keras_kvcache import samplers
from keras_kvcache.caches.kinds import read_options
from keras_kvcache.generation.buckets import capacity_for, growing_capacities
from keras_kvcache.generation.engine import Engine, Plan
from keras_kvcache.generation.multi_step import LONGEST_BURST
from keras_kvcache.generation.options import (
    GenerateOptions,
    read_stop_token_ids,
    row_ends,
    takes_options,
)
from keras_kvcache.generation.prompts import Prompts, read_prompts, write_answers
from keras_kvcache.generation.rows import NO_TOKEN, Rows
from keras_kvcache.generation.steps import StepFunctions
from keras_kvcache.generation.stream import TextStream
from keras_kvcache.samplers import stateful
from keras_kvcache.samplers.stateful import moves_rows
from keras_kvcache.tokenizers.detokenizer import new_text


class Generator:
    """Generates from a model that is called with token ids, caches and an index.

    Args:
        model: The `keras.Model` whose weights `step` and `logits` use.
        step: `(token_ids (B, T), cache, index (B,)) -> (outputs (B, T, …), cache)`:
            runs tokens at positions `index[b] … index[b] + T - 1` of row `b`.
            Outputs are logits, or what `logits` makes logits of.
        init_cache: `(batch_size, capacity) -> cache`: any pytree of arrays. What
            `generate` is told of the cache comes as `kind`, `codec` and `layout`.
        logits: `outputs (B, …) -> logits (B, V)`, applied where a token is
            sampled only. `None` if `step` gives logits.
        tokenizer: Object with `encode(text) -> ids`, `decode(ids) -> text` and
            `stop_token_ids`; `None` if only ids come in.
        max_sequence_length: The most positions that the model knows; `None` if
            there is no limit.
        is_endless: Function of what `generate` is told of the cache: whether
            positions may nevertheless go on. `None` if they never may.
        vocabulary_size: `V`, to check ids against; `None` to leave them unchecked.
        sampler: What to sample with unless told otherwise; see `samplers.get`.
        resize_cache: `(cache, capacity, fill) -> cache` with `capacity` slots, of which
            `fill` hold tokens, such as `keras_kvcache.caches.resize`. With it, caches
            for many new tokens begin with fewer slots, which `init_cache` gets as
            `room`, and grow with the text. `None` if they have all slots at once.

    On JAX, generation compiles: one program that decodes and up to three that
    run prompts, for each batch size, cache capacity and kind of sampler met.
    Lengths, limits, stop tokens, seeds and a sampler's parameters compile nothing;
    a function as sampler, or one of keras-hub's, is a kind of its own.
    """

    def __init__(
        self,
        model: Any,
        step: Callable,
        init_cache: Callable,
        logits: Any = None,
        tokenizer: Any = None,
        max_sequence_length: int | None = None,
        is_endless: Callable[..., bool] | None = None,
        vocabulary_size: int | None = None,
        sampler: Any = "greedy",
        resize_cache: Callable | None = None,
    ) -> None:
        functions = StepFunctions(step, logits or (lambda outputs: outputs))
        self._engine = Engine(model, functions, init_cache, resize_cache)
        self.tokenizer = tokenizer
        self.max_sequence_length = max_sequence_length
        self._is_endless = is_endless or (lambda **options: False)
        self.vocabulary_size = vocabulary_size
        self.sampler = sampler

    def __repr__(self):
        return (
            f"<Generator of {self._engine.model!r}, sampler={self.sampler!r}, "
            f"tokenizer={self.tokenizer!r}, "
            f"max_sequence_length={self.max_sequence_length}>"
        )

    @property
    def sampler(self) -> Any:
        """The sampler used unless told otherwise."""
        return self._sampler

    @sampler.setter
    def sampler(self, identifier: Any) -> None:
        self._sampler = samplers.get(identifier)

    def with_init_cache(self, init_cache: Callable) -> "Generator":
        """The same generator, its compiled programs included, on other caches.

        Args:
            init_cache: As in the class, for caches that hold something already,
                such as what an encoder gave.
        """
        other = copy.copy(self)
        other._engine = self._engine.with_init_cache(init_cache)
        return other

    @takes_options()
    def generate(
        self, inputs: str | Sequence | Mapping, options: GenerateOptions
    ) -> str | list | dict:
        """Continues prompts, or answers messages.

        Args:
            inputs: One of

                - a string, or a list of strings;
                - a list of messages, `[{"role": "user", "content": "…"}, …]`, or a
                  list of such lists: the model's chat template makes text of them,
                  and what comes back is the answer alone;
                - a list of ids, or a list of lists of ids;
                - keras-hub's dictionary of `"token_ids"` and `"padding_mask"`,
                  arrays `(B, T)` padded on the right. Of these, a row without room
                  for a new token stays as it is.
            {options}

        Returns:
            What came in, continued: a string, a list of strings, ids, lists of
            ids, or a dictionary of NumPy arrays `(B, max_length)`. For messages
            the text of the answer, without them; for a list of lists of messages
            a list of answers.

        Raises:
            TypeError: An argument is of the wrong kind or unknown; for a name from
                another package the message says what to write instead.
            ValueError: A prompt is empty, too long or not in the vocabulary, an
                argument is out of range, or messages came and there is no chat
                template.
        """
        prompts = self._read(inputs)
        is_bound = (options.max_length, options.max_new_tokens) != (None, None)
        if prompts.form == "arrays" and not is_bound:
            options = replace(options, max_length=prompts.width)
        plan = self._plan(prompts, options)
        new_rows = self._write(plan)
        texts = None
        if prompts.form == "text":
            rows = zip(prompts.rows, new_rows, prompts.texts, strict=True)
            texts = [new_text(self.tokenizer, *row) for row in rows]
        width = options.max_length or int(plan.ends.max())
        return write_answers(prompts, new_rows, texts, width, options.strip_prompt)

    @takes_options("strip_prompt")
    def stream(self, inputs: str | Sequence, options: GenerateOptions) -> TextStream:
        """Continues prompts, or answers messages, piece by piece.

        On a CPU up to 16 tokens are computed ahead, and other programs of JAX that the
        same thread calls meanwhile wait for these.

        Args:
            inputs: A string, a list of messages or of ids, or a list of any of these,
                as in `generate`; no dictionary of arrays.
            {options}

        Returns:
            A `TextStream`, an iterator over what was added: pieces of text for
            text, lists of ids for ids; for a list of prompts a list of one such
            piece a row. Put together they are what `generate` gives with
            `strip_prompt=True`.

        Raises:
            TypeError: An argument is of the wrong kind or unknown. This and the next
                are raised at once, not when iteration begins.
            ValueError: A prompt is empty, too long or not in the vocabulary, an
                argument is out of range, or messages came and there is no chat
                template.
        """
        prompts = self._read(inputs)
        if prompts.form == "arrays":
            raise TypeError(
                "`inputs` can't be a dictionary to stream from; give text or ids."
            )
        plan = self._plan(prompts, options)
        if moves_rows(plan.sampler):
            raise ValueError(
                "`sampler` must leave rows in their places to stream: what one gave "
                f"may be another's later. Received: {plan.sampler!r}"
            )
        bursts = self._engine.bursts(plan, self._capacities(plan), streams=True)
        return TextStream(bursts, prompts, self.tokenizer)

    def _write(self, plan):
        """A list of new ids for each row of a `Plan`."""
        if moves_rows(plan.sampler):
            return self._engine.write(plan, self._capacities(plan))
        new_rows = [[] for _ in plan.prompts]
        for tokens in self._engine.bursts(plan, self._capacities(plan)):
            for row, burst in zip(new_rows, tokens, strict=True):
                row.extend(burst[burst != NO_TOKEN].tolist())
        return new_rows

    def _read(self, inputs):
        # A model with inputs of its own has made prompts of them already.
        if isinstance(inputs, Prompts):
            return inputs
        return read_prompts(inputs, self.tokenizer, self.vocabulary_size)

    def _plan(self, prompts, options):
        """Checks all that `generate` was told, before anything runs."""
        cache = read_options(options.cache)
        context = self.max_sequence_length
        asked = (options.max_length, options.max_new_tokens) != (None, None)
        if asked and self._is_endless(**cache):
            context = None
        ends = row_ends(
            [len(row) for row in prompts.rows],
            options.max_length,
            options.max_new_tokens,
            context,
            may_be_full=prompts.form == "arrays",
        )
        stop = read_stop_token_ids(options.stop_token_ids, self.tokenizer)
        sampler = self._sampler_for(options.sampler)
        return Plan(prompts.rows, ends, stop, sampler, options.seed_word(), cache)

    def _sampler_for(self, identifier):
        return self.sampler if identifier is None else samplers.get(identifier)

    @takes_options("strip_prompt")
    def start(self, inputs: str | Sequence | Mapping, options: GenerateOptions) -> Rows:
        """Runs prompts and gives their rows, each with its first new token.

        `decode` goes on from them. Between two calls of it rows may be taken out,
        inserted and joined by the functions of `keras_kvcache.caches`, and saved.

        Args:
            inputs: As in `generate`.
            {options}

        Returns:
            `Rows`, with slots for all tokens up to their ends.

        Raises:
            TypeError, ValueError: As in `generate`.
        """
        plan = self._plan(self._read(inputs), options)
        rows, *_ = self._engine.start(plan, self._capacities(plan)[-1:])
        return rows

    def decode(
        self,
        rows: Rows,
        steps: int = LONGEST_BURST,
        sampler: str | Callable | None = None,
    ) -> tuple[Rows, np.ndarray]:
        """Goes on with rows.

        Args:
            rows: What `start` or this gave. On JAX their memory becomes that of the new
                ones; take rows out of them before, by `keras_kvcache.caches.take_rows`.
            steps: The most new tokens of a row.
            sampler: As in `start`, with which the rows began; `None` for the default.

        Returns:
            `(rows, tokens)`: the rows with what they have written since, and the new
            tokens, an int32 array `(B, steps)`, `NO_TOKEN` (-1) where there is none.
            Of a sampler that moves rows they are those of places; `rows.tokens` has
            what each row has written.

        Raises:
            TypeError, ValueError: `steps` isn't a positive integer, or the sampler is
                unknown.
        """
        sampler = self._sampler_for(sampler)
        has_begun = bool(jax.tree_util.tree_leaves(rows.sampler))
        # A sampler whose state has no arrays is rare, and asked only then.
        has_state = stateful.has_state(sampler) and (
            has_begun or bool(jax.tree_util.tree_leaves(sampler.start(rows)))
        )
        if has_begun != has_state:
            raise ValueError(
                "`sampler` must be the one with which the rows began. Received: "
                f"{sampler!r}, for rows {'with' if has_begun else 'without'} the "
                "state of a sampler"
            )
        return self._engine.decode(rows, steps, sampler)

    def resize(self, rows: Rows, capacity: int) -> Rows:
        """Gives rows more or fewer slots, so that they can join others.

        Args:
            rows: What `start` or `decode` gave.
            capacity: The new number of slots `S`; rolling caches stay as they are.

        Raises:
            ValueError: `capacity` isn't a positive integer or less than the tokens of a
                row, or there is no `resize_cache`.
        """
        return self._engine.resize(rows, capacity)

    def extend(
        self, cache: Any, token_ids: Any, index: Any, lengths: Any = None
    ) -> tuple[Any, Any]:
        """Runs tokens without choosing any, as `keras_kvcache.generation.extend` does.

        On JAX it's a compiled program, one for each shape of `token_ids`, which
        consumes the cache.

        Args:
            cache: What `init_cache` or this gave, of `B` rows.
            token_ids: int32 `(B, T)`, right-padded.
            index: int32 `(B,)`, position of each row's first token here.
            lengths: int32 `(B,)`, how many of the tokens are each row's; `None` for
                all.

        Returns:
            `(cache, logits (B, V))`, the logits after each row's last token.
        """
        token_ids, index = np.asarray(token_ids, "int32"), np.asarray(index, "int32")
        if lengths is None:
            lengths = np.full(token_ids.shape[0], token_ids.shape[1])
        return self._engine.extend(
            cache=cache,
            token_ids=token_ids,
            index=index,
            lengths=np.asarray(lengths, "int32"),
        )

    def lower(
        self,
        cache: Any,
        chunk: int | None = None,
        sampler: Any = None,
        sharding: Any = None,
    ) -> Any:
        """Lowers a program of generation without running it, to be looked at.

        Args:
            cache: What `init_cache` gives, or its shapes.
            chunk: `None` for the loop that decodes; else the program that runs a chunk
                of so many tokens of all prompts.
            sampler: As in `samplers.get`; `None` for the default.
            sharding: Where all arrays are, such as on a device that isn't there; `None`
                for here.

        Returns:
            A `jax.stages.Lowered`. Of the results the first are `Rows`.
        """
        sampler = self._sampler_for(sampler)
        return self._engine.lower(cache, chunk, sampler, sharding)

    def init_cache(self, batch_size: int, capacity: int, **options: Any) -> Any:
        """The caches that generation goes on from.

        Args:
            batch_size: `B`.
            capacity: `S`.
            **options: What `generate` is told of the cache: `kind`, `codec`,
                `layout`, and the `room` that caches begin with.

        Raises:
            ValueError: The model's own `init_cache` doesn't take the options.
        """
        return self._engine.init_cache(batch_size, capacity, **options)

    def _capacities(self, plan):
        """The numbers of slots that caches have, one after the other."""
        longest = max(len(prompt) for prompt in plan.prompts)
        end = max(int(plan.ends.max()), longest)
        limit = None if self._is_endless(**plan.cache) else self.max_sequence_length
        if self._engine.resize_cache is None:
            return (capacity_for(end, limit),)
        return growing_capacities(longest, end, limit)
