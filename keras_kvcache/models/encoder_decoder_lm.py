"""An encoder-decoder language model."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import keras
from keras import ops

from keras_kvcache.attention import token_positions
from keras_kvcache.generation import Generator, Rows, TextStream, make_program
from keras_kvcache.generation.options import takes_options_of
from keras_kvcache.layers import DecoderBlock
from keras_kvcache.layers.config_arguments import (
    has_fields_of,
    read_config,
    shows_fields_of,
)
from keras_kvcache.layers.normalization import make_normalization
from keras_kvcache.layers.quantization import KEY as QUANTIZATION
from keras_kvcache.layers.quantization import quantize_built
from keras_kvcache.models.encoded import Encoded, project_encoded
from keras_kvcache.models.encoder_decoder_config import EncoderDecoderConfig
from keras_kvcache.models.encoder_decoder_inputs import (
    DECODER_IDS,
    DECODER_MASK,
    PADDING_MASK,
    check_encoder_names,
    read_pairs,
)
from keras_kvcache.models.exporting import token_ids_input
from keras_kvcache.models.language_model import LanguageModel


@keras.saving.register_keras_serializable(package="keras_kvcache")
@has_fields_of(EncoderDecoderConfig)
class EncoderDecoderLM(LanguageModel):
    """A decoder that attends what an encoder made of its inputs.

    The inputs are encoded once, each decoder layer projects the encoder's output to
    keys and values once, and every decoded token reads these (Vaswani et al., 2017,
    https://arxiv.org/abs/1706.03762).

    Args:
        encoder: Functional `keras.Model`: a dictionary of inputs `(B, E', …)` in,
            `(B, E, D')` out. With an input `"encoder_padding_mask"` `(B, E)` the
            decoder doesn't attend the positions that it hides.
        vocabulary_size: `V`.
        num_layers: `L` of the decoder.
        num_query_heads: `N`.
        hidden_dim: `D`.
        intermediate_dim: Width of the feed-forward parts.
        num_key_value_heads: `K`; `None` for `N`.
        head_dim: `H`; `None` for `D / N`.
        max_sequence_length: Positions of the decoder, each with an embedding.
        max_encoder_length: The largest `E'`; `None` for no limit.
        encoder_vocabulary_size: What ids in an encoder's `"encoder_token_ids"` must be
            below; `None` to leave them unchecked.
        normalization, layer_norm_epsilon, normalize_first, activation,
            gated_feedforward, use_bias: Those of
            `keras_kvcache.layers.DecoderBlock`.
        use_embedding_norm, use_final_norm: Whether there is a normalization before
            the first block, and after the last one.
        dropout: Rate after the embedding, on attention weights and on each part's
            output.
        tokenizer: Object with `encode_pairs(encoder_texts, decoder_texts) -> inputs`,
            `decode(ids) -> text` and `stop_token_ids`, for text in and out. It isn't
            part of the config; it's saved beside it, as that of a `DecoderLM` is.
        parts: Layers of another model that this one shares, as in `DecoderLM`. Files
            are then written and read by that model.
        **kwargs: Arguments of `keras.Model`, such as `dtype` and `name`.

    Call arguments:
        inputs: Dictionary of the encoder's inputs and of `"decoder_token_ids"`,
            integers `(B, T)`.
        training: Whether dropout is active.

    Returns:
        Logits `(B, T, V)`.
    """

    config: EncoderDecoderConfig

    @shows_fields_of(EncoderDecoderConfig)
    def __init__(
        self,
        encoder: keras.Model,
        *sizes: Any,
        tokenizer: Any = None,
        parts: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        config, options = read_config(EncoderDecoderConfig, sizes, options)
        super().__init__(config, tokenizer=tokenizer, parts=parts, **options)
        names = getattr(encoder, "input", None)
        if not isinstance(encoder, keras.Model) or not isinstance(names, dict):
            raise TypeError(
                "`encoder` must be a functional `keras.Model` whose inputs are a "
                f"dictionary. Received: {encoder!r}"
            )
        self.encoder, self.encoder_inputs = encoder, sorted(names)
        self._encode_program = None
        self._create_layers()
        # All shapes are known, so that weights can be loaded before any call.
        self.build()

    def _create_layers(self):
        """Makes the decoder's layers that aren't among `parts`."""
        config = self.config
        embedding = functools.partial(
            keras.layers.Embedding,
            output_dim=config.hidden_dim,
            dtype=self.dtype_policy,
        )
        norm = functools.partial(
            make_normalization,
            config.normalization,
            config.layer_norm_epsilon,
            dtype=self.dtype_policy,
        )
        self.token_embedding = self._part(
            "token_embedding",
            lambda: keras.layers.ReversibleEmbedding(
                config.vocabulary_size,
                config.hidden_dim,
                dtype=self.dtype_policy,
                name="token_embedding",
            ),
        )
        self.position_table = self._part(
            "position_table",
            lambda: embedding(config.max_sequence_length, name="position_embedding"),
        )
        self.embedding_norm = self.final_norm = None
        if config.use_embedding_norm:
            self.embedding_norm = self._part(
                "embedding_norm", lambda: norm("embedding_norm")
            )
        self.embedding_dropout = keras.layers.Dropout(
            config.dropout, dtype=self.dtype_policy
        )
        self.blocks = [
            self._part(f"block_{i}", functools.partial(self._make_block, i, layer))
            for i, layer in enumerate(config.layers)
        ]
        if config.use_final_norm:
            self.final_norm = self._part("final_norm", lambda: norm("final_norm"))

    def _make_block(self, index, layer):
        return DecoderBlock(
            **vars(layer), dtype=self.dtype_policy, name=f"block_{index}"
        )

    def build(self, input_shape: Sequence[int | None] | None = None) -> None:
        """Creates all weights; the shape of the input doesn't matter."""
        shape = (None, None, self.config.hidden_dim)
        encoder_shape = (None, None, self.encoder.output.shape[-1])
        for block in self.blocks:
            if not block.built:
                block.build(shape, encoder_shape)
        for layer in (self.token_embedding, self.position_table):
            if not layer.built:
                layer.build((None, None))
        for norm in (self.embedding_norm, self.final_norm):
            if norm is not None and not norm.built:
                norm.build(shape)
        self.built = True

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Logits `(B, T, V)` of a dictionary of encoder inputs and decoder ids."""
        encoder_inputs = {name: inputs[name] for name in self.encoder_inputs}
        sequence = self.encoder(encoder_inputs, training=training)
        mask = encoder_inputs.get(PADDING_MASK)
        x = self._embed(inputs[DECODER_IDS], 0, training)
        for block in self.blocks:
            x = block(x, sequence, encoder_padding_mask=mask, training=training)
        return self.logits(self._finish(x))

    @property
    def call_inputs(self) -> Any:
        """The inputs of `call`, a dictionary of symbolic tensors."""
        return {**self.encoder.input, DECODER_IDS: token_ids_input(DECODER_IDS)}

    def _run_with_cache(self, token_ids, cache, cache_update_index, run_block):
        """`hidden_with_cache` with a function that calls the blocks.

        The cache is the pair of what `init_cache` and what `encode` gave; what is
        encoded stays as it was.
        """
        own, encoded = cache
        x = self._embed(token_ids, cache_update_index)
        updated = []
        for block, layer_cache, encoder_cache in zip(
            self.blocks, own, encoded.caches, strict=True
        ):
            x, layer_cache, _ = run_block(
                block,
                x,
                encoder_padding_mask=encoded.padding_mask,
                self_attention_cache=layer_cache,
                self_attention_cache_update_index=cache_update_index,
                cross_attention_cache=encoder_cache,
            )
            updated.append(layer_cache)
        return self._finish(x), (tuple(updated), encoded)

    def encode(
        self, inputs: Any, codec: Any = None, layout: str = "head_major"
    ) -> Encoded:
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
        caches = project_encoded(self.blocks, sequence, codec, layout)
        return Encoded(caches, inputs.get(PADDING_MASK))

    def _resize_cache(self, cache, capacity, fill):
        """As in `LanguageModel`; what was encoded stays as it is."""
        cache, encoded = cache
        return super()._resize_cache(cache, capacity, fill), encoded

    @takes_options_of(Generator.generate)
    def generate(self, inputs: Any, **options: Any) -> str | list | dict:
        """Answers the encoder's inputs, continuing the decoder's prompt.

        Codec and layout of `cache` hold for the encoder's keys and values, too.

        Args:
            inputs: With a tokenizer a string, a list of strings, or a dictionary of
                `"encoder_text"` and `"decoder_text"`. Else a dictionary of the
                encoder's inputs, arrays `(B, E', …)`, and of `"decoder_token_ids"`:
                ids, rows of ids, or, with a `"decoder_padding_mask"`, arrays
                `(B, T)` padded on the right. An `"encoder_padding_mask"` may be left
                out; what it hides of all rows at the end isn't computed.
            {options}

        Returns:
            What the decoder was given, continued: text, ids, or a dictionary of
            `"decoder_token_ids"` and `"decoder_padding_mask"`.

        Raises:
            TypeError: An argument is of the wrong kind or unknown.
            ValueError: Inputs are missing, too long or don't fit together, or an
                argument is out of range.
        """
        arrays, prompts = read_pairs(inputs, self)
        answer = self.generator_of(arrays).generate(prompts, **options)
        if prompts.form != "arrays":
            return answer
        return {
            DECODER_IDS: answer["token_ids"],
            DECODER_MASK: answer["padding_mask"],
        }

    @takes_options_of(Generator.stream)
    def stream(self, inputs: Any, **options: Any) -> TextStream:
        """Answers the encoder's inputs, piece by piece.

        Args:
            inputs: As in `generate`; for arrays lists of ids are streamed.
            {options}

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
        return self.generator_of(arrays).stream(prompts, **options)

    @takes_options_of(Generator.start)
    def start(self, inputs: Any, **options: Any) -> Rows:
        """Encodes inputs and gives the decoder's rows, as `Generator.start` does.

        Args:
            inputs: As in `generate`.
            {options}

        Returns:
            `keras_kvcache.generation.Rows`, from which `generator.decode` goes on; the
            cache is the pair of the decoder's caches and of what was encoded.

        Raises:
            TypeError, ValueError: As in `generate`.
        """
        arrays, prompts = read_pairs(inputs, self)
        return self.generator_of(arrays).start(prompts, **options)

    def generator_of(self, arrays: dict[str, Any]) -> Generator:
        """The generator, on caches that begin with the encoder's work.

        Args:
            arrays: The encoder's inputs, by name; `(B, E', …)` each.
        """
        if self._encode_program is None:
            self._encode_program = make_program(
                self.encode, self, static=("codec", "layout")
            )

        def init_cache(batch_size, capacity, **options):
            both = {k: v for k, v in options.items() if k in ("codec", "layout")}
            encoded = self._encode_program(inputs=arrays, **both)
            return self.init_cache(batch_size, capacity, **options), encoded

        return self.generator.with_init_cache(init_cache)

    def _embed(self, token_ids, index, training=None):
        self._check_positions(DECODER_IDS, token_ids.shape[1], index)
        positions = token_positions(index, ops.shape(token_ids)[1])
        # Padding may reach past the last position that the model knows.
        positions = ops.minimum(positions, self.config.max_sequence_length - 1)
        x = self.token_embedding(token_ids) + self.position_table(positions)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        return self.embedding_dropout(x, training=training)

    def _finish(self, x):
        return x if self.final_norm is None else self.final_norm(x)

    def get_config(self) -> dict[str, Any]:
        """Constructor arguments, the tokenizer excepted."""
        encoder = keras.saving.serialize_keras_object(self.encoder)
        return {**super().get_config(), **self.config.to_dict(), "encoder": encoder}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "EncoderDecoderLM":
        """The model that `get_config` describes."""
        encoder = keras.saving.deserialize_keras_object(config["encoder"])
        model = cls(**{**config, "encoder": encoder})
        # Configs of Keras' own attention, as in an encoder, don't say it.
        quantize_built(model, config.get(QUANTIZATION, {}))
        return model
