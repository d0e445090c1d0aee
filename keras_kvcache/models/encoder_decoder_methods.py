"""What an encoder-decoder model needs to generate: what is encoded, and two methods."""

from dataclasses import replace
from typing import Any, NamedTuple

from keras_kvcache.caches import CacheSpec, get_codec
from keras_kvcache.generation import make_program
from keras_kvcache.models.decoding import DecodingMethods
from keras_kvcache.models.encoder_decoder_inputs import (
    DECODER_IDS,
    DECODER_MASK,
    PADDING_MASK,
    check_encoder_names,
    read_pairs,
)


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

    def generate(self, inputs, **options):
        """Answers what the encoder reads, going on from what the decoder is given.

        Args:
            inputs: With a tokenizer a string, a list of strings, or a dictionary of
                `"encoder_text"` and `"decoder_text"`. Else a dictionary of the
                encoder's inputs, arrays `(B, E', …)`, and of `"decoder_token_ids"`:
                ids, rows of ids, or, with a `"decoder_padding_mask"`, arrays
                `(B, T)` padded on the right. An `"encoder_padding_mask"` may be left
                out; what it hides of all rows at the end isn't computed.
            **options: As in `keras_kvcache.Generator.generate`, of the decoder's
                tokens. The codec and the layout of a `cache` hold for the encoder's
                keys and values too.

        Returns:
            What the decoder was given, continued: text, ids, or a dictionary of
            `"decoder_token_ids"` and `"decoder_padding_mask"`.

        Raises:
            TypeError: An argument is of the wrong kind.
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

    def stream(self, inputs, **options):
        """Answers piece by piece; see `keras_kvcache.Generator.stream`.

        `inputs` are those of `generate`; of arrays lists of ids are streamed.
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
