"""What an encoder-decoder model needs to generate: what is encoded, and two methods."""

from dataclasses import replace
from typing import Any, NamedTuple

from keras_kvcache.caches import CacheSpec, get_codec
from keras_kvcache.generation import Generator, TextStream, make_program
from keras_kvcache.generation.foreign_arguments import ADVICE
from keras_kvcache.generation.methods import takes_options_of
from keras_kvcache.models.decoding import DecodingMethods
from keras_kvcache.models.encoder_decoder_inputs import (
    DECODER_IDS,
    DECODER_MASK,
    PADDING_MASK,
    check_encoder_names,
    read_pairs,
)
from keras_kvcache.unknown_arguments import explains_unknown


class Encoded(NamedTuple):
    """What decoding reads of an encoder, and never writes.

    Attributes:
        caches: Tuple of one cache a layer: the encoder's keys and values, `E` slots.
        padding_mask: Boolean `(B, E)`, `False` for positions to hide, or `None`.
    """

    caches: tuple
    padding_mask: Any = None


class EncoderDecoderMethods(DecodingMethods):
    """Gives `EncoderDecoderLM` its `encode`, `generate` and `stream`.

    `init_cache` and what else it shares with a `DecoderLM` is about self-attention.
    """

    _encode_program = None

    def encode(self, inputs, codec=None, layout="head_major"):
        """Runs the encoder and projects its output to each layer's keys and values.

        Args:
            inputs: Dictionary of the encoder's inputs, tensors `(B, E', …)`.
            codec: As in `cache_specs`.
            layout: As in `cache_specs`.

        Returns:
            `Encoded`.

        Raises:
            ValueError: One of the inputs is missing.
        """
        check_encoder_names(inputs, self.encoder_inputs)
        inputs = {name: inputs[name] for name in self.encoder_inputs}
        sequence = self.encoder(inputs, training=False)
        spec = CacheSpec(
            *sequence.shape[:2],
            self.num_key_value_heads,
            self.head_dim,
            codec=get_codec(codec, self.compute_dtype),
            layout=layout,
        )

        def project(block):
            entries = block.cross_attention.project_entries(sequence, None, 0)
            cache, _ = spec.allocate().update(*entries, 0)
            return cache

        caches = tuple(project(block) for block in self.blocks)
        return Encoded(caches, inputs.get(PADDING_MASK))

    def _resize_cache(self, cache, capacity, fill):
        """As in `DecodingMethods`; what was encoded stays as it is."""
        cache, encoded = cache
        return super()._resize_cache(cache, capacity, fill), encoded

    @explains_unknown(ADVICE)
    @takes_options_of(Generator.generate)
    def generate(self, inputs, **options) -> str | list | dict:
        """Answers the encoder's inputs, continuing the decoder's prompt.

        Args:
            inputs: With a tokenizer a string, a list of strings, or a dictionary of
                `"encoder_text"` and `"decoder_text"`. Else a dictionary of the
                encoder's inputs, arrays `(B, E', …)`, and of `"decoder_token_ids"`:
                ids, rows of ids, or, with a `"decoder_padding_mask"`, arrays
                `(B, T)` padded on the right. An `"encoder_padding_mask"` may be left
                out; what it hides of all rows at the end isn't computed.
            max_length: The most tokens of the decoder's prompt and answer together.
            max_new_tokens: The most new tokens. The smallest of both and of the
                model's own limit counts. For arrays without either, `T` is the
                `max_length`, as in keras-hub.
            stop_token_ids: Ids that end a row, which keeps them: `"auto"` for the
                tokenizer's, `None` for none, or ids.
            strip_prompt: Whether to leave out what the decoder was given.
            sampler: As in `samplers.get`; `None` for the default.
            seed: Integer. The same seed gives the same answer; `None` draws one
                from Python's `random`.
            cache: What to keep keys and values in: a kind, a codec, or a dictionary
                of `"kind"`, `"codec"` and `"layout"`, as in
                `keras_kvcache.Generator.generate`. Codec and layout hold for the
                encoder's keys and values too. `None` for the model's choice.

        Returns:
            What the decoder was given, continued: text, ids, or a dictionary of
            `"decoder_token_ids"` and `"decoder_padding_mask"`.

        Raises:
            TypeError: An argument is of the wrong kind or unknown.
            ValueError: Inputs are missing, too long or don't fit together, or an
                argument is out of range.
        """
        arrays, prompts = read_pairs(inputs, self)
        answer = self._generator_of(arrays).generate(prompts, **options)
        if prompts.form != "arrays":
            return answer
        return {
            DECODER_IDS: answer["token_ids"],
            DECODER_MASK: answer["padding_mask"],
        }

    @explains_unknown(ADVICE)
    @takes_options_of(Generator.stream)
    def stream(self, inputs, **options) -> TextStream:
        """Answers the encoder's inputs, piece by piece.

        Args:
            inputs: As in `generate`; for arrays lists of ids are streamed.
            max_length: The most tokens of the decoder's prompt and answer together.
            max_new_tokens: The most new tokens. The smallest of both and of the
                model's own limit counts.
            stop_token_ids: Ids that end a row: `"auto"` for the tokenizer's, `None`
                for none, or ids.
            sampler: As in `samplers.get`; `None` for the default.
            seed: Integer. The same seed gives the same answer; `None` draws one
                from Python's `random`.
            cache: As in `generate`.

        Returns:
            A `TextStream`, an iterator over what was added to the decoder's prompt:
            pieces of text for text, lists of ids for ids; for several rows a list of
            one such piece a row.

        Raises:
            TypeError: An argument is of the wrong kind or unknown.
            ValueError: Inputs are missing, too long or don't fit together, or an
                argument is out of range.
        """
        arrays, prompts = read_pairs(inputs, self)
        if prompts.form == "arrays":
            prompts = replace(prompts, form="ids")
        return self._generator_of(arrays).stream(prompts, **options)

    def _generator_of(self, arrays):
        """The generator, on caches that begin with the encoder's work."""
        if self._encode_program is None:
            self._encode_program = make_program(
                self.encode, self, static=("codec", "layout")
            )

        def init_cache(batch_size, capacity, **options):
            both = {k: v for k, v in options.items() if k in ("codec", "layout")}
            encoded = self._encode_program(inputs=arrays, **both)
            return self.init_cache(batch_size, capacity, **options), encoded

        return self.generator.with_init_cache(init_cache)
