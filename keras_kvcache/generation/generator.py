"""Generation from any Keras model built with caches."""

from __future__ import annotations

import copy
import inspect
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
from keras import ops

from keras_kvcache import samplers
from keras_kvcache.caches import Codec, Rolling, Static, read_options
from keras_kvcache.caches.bits import as_bits
from keras_kvcache.generation.bursts import LONGEST_BURST, make_reader
from keras_kvcache.generation.detokenizer import new_text
from keras_kvcache.generation.foreign_arguments import ADVICE
from keras_kvcache.generation.growth import Growth, growing_capacities
from keras_kvcache.generation.limits import read_stop_token_ids, row_ends
from keras_kvcache.generation.program import make_program
from keras_kvcache.generation.prompts import (
    Prompts,
    padded_chunks,
    read_prompts,
    write_answers,
)
from keras_kvcache.generation.sizes import SMALLEST_CAPACITY, capacity_for
from keras_kvcache.generation.steps import (
    NO_TOKEN,
    DecodeState,
    Limits,
    StepFunctions,
    decode,
    prefill,
)
from keras_kvcache.generation.stream import TextStream
from keras_kvcache.unknown_arguments import explains_unknown


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
        model,
        step,
        init_cache,
        logits=None,
        tokenizer=None,
        max_sequence_length=None,
        is_endless=None,
        vocabulary_size=None,
        sampler="greedy",
        resize_cache=None,
    ):
        self._model = model
        self._functions = StepFunctions(step, logits or (lambda outputs: outputs))
        self._init_cache = init_cache
        self._resize_cache = resize_cache
        self.tokenizer = tokenizer
        self.max_sequence_length = max_sequence_length
        self._is_endless = is_endless or (lambda **options: False)
        self.vocabulary_size = vocabulary_size
        self.sampler = sampler
        self._prefill = make_program(self._run_prefill, model, donate=("cache",))
        self._decode = make_program(self._run_decode, model, donate=("state",))

    def __repr__(self):
        return (
            f"<Generator of {self._model!r}, sampler={self.sampler!r}, "
            f"tokenizer={self.tokenizer!r}, "
            f"max_sequence_length={self.max_sequence_length}>"
        )

    def _run_prefill(self, **arguments):
        return prefill(self._functions, **arguments)

    def _run_decode(self, **arguments):
        return decode(self._functions, width=LONGEST_BURST, **arguments)

    @property
    def sampler(self):
        """The sampler used unless told otherwise."""
        return self._sampler

    @sampler.setter
    def sampler(self, identifier):
        self._sampler = samplers.get(identifier)

    def with_init_cache(self, init_cache):
        """The same generator, its compiled programs included, on other caches.

        Args:
            init_cache: As in the class, for caches that hold something already,
                such as what an encoder gave.
        """
        other = copy.copy(self)
        other._init_cache = init_cache
        return other

    @explains_unknown(ADVICE)
    def generate(
        self,
        inputs: str | Sequence | Mapping,
        max_length: int | None = None,
        max_new_tokens: int | None = None,
        stop_token_ids: Literal["auto"] | int | Sequence[int] | None = "auto",
        strip_prompt: bool = False,
        sampler: str | Callable | None = None,
        seed: int | None = None,
        cache: str | Static | Rolling | Codec | dict | None = None,
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
            max_length: The most tokens of prompt and answer together.
            max_new_tokens: The most new tokens. The smallest of both and of the
                model's own limit counts. For a dictionary without either, `T` is
                the `max_length`, as in keras-hub.
            stop_token_ids: Ids that end a row, which keeps them: `"auto"` for the
                tokenizer's, `None` for none, or ids.
            strip_prompt: Whether to give the new tokens or text only.
            sampler: As in `samplers.get`; `None` for the default.
            seed: Integer. The same seed gives the same answer; `None` draws one
                from Python's `random`, which `keras.utils.set_random_seed` seeds.
            cache: What to keep keys and values in: a kind (`"auto"`, `"static"`,
                `"rolling"`, `keras_kvcache.caches.Rolling(window=…)`), a codec
                (`"float32"`, `"bfloat16"`, `"float16"`, `"int8"`, `"int4"`), or a
                dictionary of `"kind"`, `"codec"` and `"layout"`. `None` for
                the model's choice.

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
        if prompts.form == "arrays" and max_length is None and max_new_tokens is None:
            max_length = prompts.width
        options = read_options(cache)
        ends = self._ends(prompts, max_length, max_new_tokens, options)
        bursts = self._bursts(
            prompts.rows, ends, stop_token_ids, sampler, seed, options
        )
        new_rows = [[] for _ in prompts.rows]
        for tokens in bursts:
            for row, burst in zip(new_rows, tokens, strict=True):
                row.extend(burst[burst != NO_TOKEN].tolist())
        texts = None
        if prompts.form == "text":
            rows = zip(prompts.rows, new_rows, prompts.texts, strict=True)
            texts = [new_text(self.tokenizer, *row) for row in rows]
        width = max_length or int(ends.max())
        return write_answers(prompts, new_rows, texts, width, strip_prompt)

    @explains_unknown(ADVICE)
    def stream(
        self,
        inputs: str | Sequence,
        max_length: int | None = None,
        max_new_tokens: int | None = None,
        stop_token_ids: Literal["auto"] | int | Sequence[int] | None = "auto",
        sampler: str | Callable | None = None,
        seed: int | None = None,
        cache: str | Static | Rolling | Codec | dict | None = None,
    ) -> TextStream:
        """Continues prompts, or answers messages, piece by piece.

        On a CPU up to 16 tokens are computed ahead, and other programs of JAX that the
        same thread calls meanwhile wait for these.

        Args:
            inputs: A string, a list of messages or of ids, or a list of any of these,
                as in `generate`; no dictionary of arrays.
            max_length: The most tokens of prompt and answer together.
            max_new_tokens: The most new tokens. The smallest of both and of the
                model's own limit counts.
            stop_token_ids: Ids that end a row: `"auto"` for the tokenizer's, `None`
                for none, or ids.
            sampler: As in `samplers.get`; `None` for the default.
            seed: Integer. The same seed gives the same answer; `None` draws one
                from Python's `random`.
            cache: What to keep keys and values in: a kind, a codec, or a dictionary
                of `"kind"`, `"codec"` and `"layout"`, as in `generate`. `None` for
                the model's choice.

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
        options = read_options(cache)
        ends = self._ends(prompts, max_length, max_new_tokens, options)
        bursts = self._bursts(
            prompts.rows, ends, stop_token_ids, sampler, seed, options, streams=True
        )
        return TextStream(bursts, prompts, self.tokenizer)

    def _read(self, inputs):
        # A model with inputs of its own has made prompts of them already.
        if isinstance(inputs, Prompts):
            return inputs
        return read_prompts(inputs, self.tokenizer, self.vocabulary_size)

    def _ends(self, prompts, max_length, max_new_tokens, options):
        context = self.max_sequence_length
        asked = (max_length, max_new_tokens) != (None, None)
        if asked and self._is_endless(**options):
            context = None
        return row_ends(
            [len(row) for row in prompts.rows],
            max_length,
            max_new_tokens,
            context,
            may_be_full=prompts.form == "arrays",
        )

    def _bursts(
        self, rows, ends, stop_token_ids, sampler, seed, options, streams=False
    ):
        """Checks the remaining arguments, then iterates over new tokens.

        Yields:
            int32 arrays `(B, any)`, `NO_TOKEN` for rows that have ended.
        """
        stop = read_stop_token_ids(stop_token_ids, self.tokenizer)
        sampler = self.sampler if sampler is None else samplers.get(sampler)
        if seed is None:
            seed = random.randrange(2**32)
        if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
            raise TypeError(f"`seed` must be an integer. Received: {seed!r}")
        seed = np.uint32(int(seed) % 2**32)
        # A few sizes, so that the number of stop tokens compiles nothing.
        padded = np.full(max(8, 1 << len(stop).bit_length()), NO_TOKEN, "int32")
        padded[: len(stop)] = stop
        limits = Limits(ends, padded)
        return self._run(rows, limits, sampler, seed, options, streams)

    def _build(self):
        """Lets a model that was never called make its weights.

        Made while a program is traced they would be of no use outside of it.
        """
        model = self._model
        if model.built and all(layer.built for layer in model.layers):
            return
        cache = self._init_cache(1, SMALLEST_CAPACITY)
        token_ids, index = ops.zeros((1, 1), "int32"), ops.zeros((1,), "int32")
        outputs, _ = self._functions.step(token_ids, cache, index)
        self._functions.logits(outputs[:, 0])

    def init_cache(self, batch_size, capacity, **options):
        """The caches that generation goes on from.

        Args:
            batch_size: `B`.
            capacity: `S`.
            **options: What `generate` is told of the cache: `kind`, `codec`,
                `layout`, and the `room` that caches begin with.

        Raises:
            ValueError: The model's own `init_cache` doesn't take the options.
        """
        if options:
            try:
                signature = inspect.signature(self._init_cache)
                signature.bind(batch_size, capacity, **options)
            except TypeError as error:
                raise ValueError(
                    "`cache` needs an `init_cache` that takes its options. Received: "
                    f"{options}: {error}"
                ) from error
        return as_bits(self._init_cache(batch_size, capacity, **options))

    def _run(self, rows, limits, sampler, seed, options, streams):
        self._build()
        # 1. Room for the longest row, in one of few sizes, or for its beginning.
        lengths = np.array([len(row) for row in rows], "int32")
        end = max(int(limits.end.max()), int(lengths.max()))
        limit = None if self._is_endless(**options) else self.max_sequence_length
        capacities = (capacity_for(end, limit),)
        if self._resize_cache is not None:
            capacities = growing_capacities(int(lengths.max()), end, limit)
        at_first = {"room": capacities[0]} if len(capacities) > 1 else {}
        cache = self.init_cache(len(rows), capacities[-1], **options, **at_first)
        # 2. The prompts, chunk by chunk; each row's first new token.
        cache, token = self._run_prompts(cache, rows, lengths, sampler, seed)
        is_full = lengths >= limits.end
        yield np.where(is_full, NO_TOKEN, token)[:, None]
        done = np.isin(token, limits.stop_token_ids) | (lengths + 1 >= limits.end)
        if done.all():
            return
        # 3. The rest. While the caller looks at one burst the next one is
        # computed, at worst for nothing, unless caches must grow for it.
        index = np.minimum(lengths, capacities[0] - 1)
        state = DecodeState(cache, token, index, done, step=np.int32(1))
        reader = make_reader(len(rows), streams)
        try:
            decode_burst = self._decode.bind(
                limits=limits,
                sampler=sampler,
                seed=seed,
                steps=np.int32(reader.steps),
                channel=reader.channel,
            )
            growth = Growth(self._resize_cache, capacities, int(lengths.max()))
            state, tokens = decode_burst(state=state)
            growth.advance(reader.steps)
            while True:
                following = None
                if growth.has_room(reader.steps):
                    state, following = decode_burst(state=state)
                yield from reader.read(tokens)
                last = ops.convert_to_numpy(tokens)[:, reader.steps - 1]
                if (last == NO_TOKEN).all():
                    return
                if following is None:
                    state = state._replace(cache=growth.grow(state.cache))
                    state, following = decode_burst(state=state)
                growth.advance(reader.steps)
                tokens = following
        finally:
            reader.close()

    def _run_prompts(self, cache, rows, lengths, sampler, seed):
        token = np.full(len(rows), NO_TOKEN, "int32")
        for first, token_ids in padded_chunks(rows):
            cache, token = self._prefill(
                cache=cache,
                token=token,
                token_ids=token_ids,
                first=np.int32(first),
                lengths=lengths,
                sampler=sampler,
                seed=np.array([seed, 0], "uint32"),
            )
        return cache, ops.convert_to_numpy(token)
