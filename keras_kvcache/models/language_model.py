"""A language model: steps with caches, and a generator that runs them."""

import functools
from dataclasses import replace
from typing import Any, NamedTuple

import keras

from keras_kvcache.caches import CacheSpec, Rolling, Static, resize
from keras_kvcache.generation import Generator
from keras_kvcache.generation.options import as_method
from keras_kvcache.layers import DecoderBlock
from keras_kvcache.layers.block_programs import BlockPrograms, run_block
from keras_kvcache.layers.projections import project
from keras_kvcache.models.decoder_config import DecoderConfig
from keras_kvcache.models.encoder_decoder_config import EncoderDecoderConfig
from keras_kvcache.models.logits import vocabulary_logits
from keras_kvcache.models.saved_model import SavedModel


class CacheBytes(NamedTuple):
    """The bytes that caches take.

    Attributes:
        per_token: One token of one row, while it's kept.
        per_row: One row, whatever of it is filled.
        total: All rows, which is what is allocated.
    """

    per_token: float
    per_row: int
    total: int


class LanguageModel(SavedModel):
    """Base of the models here: decoder blocks between embeddings and logits.

    A subclass makes the layers named below, and implements `_run_with_cache`.

    Args:
        config: A frozen dataclass, as below.
        **kwargs: Arguments of `SavedModel`.

    Attributes:
        config: What the model is made of: a `DecoderConfig`, or an
            `EncoderDecoderConfig`. Its fields are attributes of the model, too, which
            can't be set.
        token_embedding: `keras.layers.ReversibleEmbedding`; its table gives logits.
        blocks: List of the `DecoderBlock`s.
    """

    config: DecoderConfig | EncoderDecoderConfig
    token_embedding: keras.layers.ReversibleEmbedding
    blocks: list[DecoderBlock]

    def __init__(
        self, config: DecoderConfig | EncoderDecoderConfig, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.config = config
        self._generator = None

    def _run_with_cache(self, token_ids, cache, cache_update_index, run_block):
        """`hidden_with_cache`, where `run_block` calls a block, as `run_block` does."""
        raise NotImplementedError

    generate = as_method(Generator.generate)
    stream = as_method(Generator.stream)

    def call_with_cache(
        self, token_ids: Any, cache: Any, cache_update_index: Any
    ) -> tuple[Any, Any, Any]:
        """One step of decoding, or a part of a prompt.

        Args:
            token_ids: Integer tensor `(B, T)`: the tokens at positions
                `cache_update_index … cache_update_index + T - 1`.
            cache: What `init_cache` or an earlier call gave: one cache a layer,
                each a cache object or a dense tensor `(B, 2, S, K, H)`. With an
                encoder the pair of these and of what `encode` gave.
            cache_update_index: An int, or an integer tensor of shape `()` or
                `(B,)`.

        Returns:
            `(logits, hidden_states, cache)`: `(B, T, V)`, `(B, T, D)` and the
            updated caches.

        Raises:
            ValueError: There isn't one cache a layer, or one doesn't fit.
        """
        hidden_states, cache = self.hidden_with_cache(
            token_ids, cache, cache_update_index
        )
        return self.logits(hidden_states), hidden_states, cache

    def hidden_with_cache(
        self, token_ids: Any, cache: Any, cache_update_index: Any
    ) -> tuple[Any, Any]:
        """`call_with_cache` without the logits: `(hidden_states, cache)`."""
        return self._run_with_cache(token_ids, cache, cache_update_index, run_block)

    def logits(self, hidden_states: Any) -> Any:
        """Logits `(…, V)` of final hidden states `(…, D)`."""
        of_vocabulary = functools.partial(vocabulary_logits, self.token_embedding)
        return project(of_vocabulary, hidden_states)

    def cache_specs(
        self,
        batch_size: int,
        max_length: int | None = None,
        kind: Any = "auto",
        codec: Any = None,
        layout: str = "head_major",
    ) -> tuple[CacheSpec, ...]:
        """The `CacheSpec` of each layer's cache.

        Args:
            batch_size: `B`.
            max_length: How many positions they are to take; `None` for
                `max_sequence_length`.
            kind: `"static"`, `"rolling"` or a `keras_kvcache.caches.Rolling` for all
                layers, or `"auto"`: rolling where a layer has a sliding window that
                `max_length` outgrows, static elsewhere.
            codec: `"float32"`, `"float16"`, `"bfloat16"`, `"float64"`, `"int8"`,
                `"int4"` or a `Codec`; `None` for the model's compute dtype.
            layout: `"head_major"` or `"dense"`.

        Returns:
            A tuple of `keras_kvcache.caches.CacheSpec`, one a layer.

        Raises:
            ValueError: An option is unknown or doesn't suit the model.
        """
        if max_length is None:
            max_length = self.config.max_sequence_length
        return tuple(
            block.cache_spec(batch_size, max_length, codec, kind, layout)
            for block in self.blocks
        )

    def cache_bytes(
        self,
        batch_size: int,
        max_length: int | None = None,
        kind: Any = "auto",
        codec: Any = None,
        layout: str = "head_major",
    ) -> CacheBytes:
        """The bytes that the caches of all layers take. Arguments as in `cache_specs`.

        Returns:
            `CacheBytes`.
        """
        specs = self.cache_specs(batch_size, max_length, kind, codec, layout)
        return CacheBytes(
            sum(spec.bytes_per_token for spec in specs),
            sum(spec.bytes_per_row for spec in specs),
            sum(spec.nbytes for spec in specs),
        )

    def init_cache(
        self,
        batch_size: int,
        max_length: int | None = None,
        kind: Any = "auto",
        codec: Any = None,
        layout: str = "head_major",
        room: int | None = None,
    ) -> tuple[Any, ...]:
        """Empty caches, a tuple of one a layer.

        Args:
            batch_size, max_length, kind, codec, layout: As in `cache_specs`.
            room: Slots that static caches begin with, if fewer than `max_length`;
                `keras_kvcache.caches.resize` gives them more. `None` for all.
        """
        specs = self.cache_specs(batch_size, max_length, kind, codec, layout)
        if room is not None:
            specs = [replace(spec, capacity=min(room, spec.capacity)) for spec in specs]
        return tuple(spec.allocate() for spec in specs)

    def _resize_cache(self, cache, capacity, fill):
        """The caches of `init_cache`, with another number of slots."""
        return resize(cache, capacity, fill)

    def _check_positions(self, name, length, index):
        """Refuses tokens past the last position, as far as both numbers are known.

        Args:
            name: What the argument with the tokens is called.
            length: `T`; `None` or a symbol where it isn't known.
            index: Position of the first token.
        """
        # An exported program's length is a symbol.
        is_known = isinstance(index, int) and isinstance(length, int)
        limit = self.config.max_sequence_length
        if is_known and self.config.has_last_position and index + length > limit:
            raise ValueError(
                f"`{name}` must stay within the positions that the model knows, "
                f"max_sequence_length={limit}. Received: {length} tokens from "
                f"{index} on"
            )

    def is_endless(self, kind: Any = "auto", **options: Any) -> bool:
        """Whether positions may go past `max_sequence_length`.

        They may where the model has no last one and every layer sees a window.

        Args:
            kind: As in `cache_specs`.
            **options: Its other options, which don't matter.
        """
        if self.config.has_last_position:
            return False
        slides = all(block.sliding_window is not None for block in self.blocks)
        return isinstance(kind, Rolling) or (
            slides and kind not in ("static", Static())
        )

    @property
    def generator(self) -> Generator:
        """The `Generator` behind `generate` and `stream`."""
        if self._generator is None:
            # `resize` may not know the caches that a subclass makes.
            has_own = type(self).init_cache is not LanguageModel.init_cache
            step = self.hidden_with_cache
            if type(self).hidden_with_cache is LanguageModel.hidden_with_cache:
                # The loop may donate its caches; the step of a subclass may need them.
                programs = BlockPrograms()
                step = functools.partial(self._run_with_cache, run_block=programs)
            self._generator = Generator(
                self,
                step=step,
                init_cache=self.init_cache,
                logits=self.logits,
                tokenizer=self.tokenizer,
                max_sequence_length=self.config.max_sequence_length,
                is_endless=self.is_endless,
                vocabulary_size=self.config.vocabulary_size,
                resize_cache=None if has_own else self._resize_cache,
            )
        # A user may have set the model's tokenizer since.
        self._generator.tokenizer = self.tokenizer
        return self._generator
