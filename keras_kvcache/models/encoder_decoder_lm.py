"""An encoder-decoder language model."""

import functools

import keras
from keras import ops

from keras_kvcache.layers import DecoderBlock
from keras_kvcache.layers.adoption import AdoptsParts
from keras_kvcache.layers.normalization import make_normalization
from keras_kvcache.layers.quantization import KEY as QUANTIZATION
from keras_kvcache.layers.quantization import quantize_built
from keras_kvcache.models.encoder_decoder_inputs import DECODER_IDS, PADDING_MASK
from keras_kvcache.models.encoder_decoder_methods import EncoderDecoderMethods
from keras_kvcache.models.exporting import Exports, token_ids_input
from keras_kvcache.models.tokenizer_files import KeepsTokenizer
from keras_kvcache.ops import token_positions

BLOCK_OPTIONS = (
    "num_query_heads",
    "intermediate_dim",
    "num_key_value_heads",
    "head_dim",
    "normalization",
    "layer_norm_epsilon",
    "normalize_first",
    "activation",
    "gated_feedforward",
    "use_bias",
    "dropout",
)


@keras.saving.register_keras_serializable(package="keras_kvcache")
class EncoderDecoderLM(
    EncoderDecoderMethods, KeepsTokenizer, Exports, AdoptsParts, keras.Model
):
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
        **kwargs: Arguments of `keras.Model`, such as `dtype` and `name`.

    Call arguments:
        inputs: Dictionary of the encoder's inputs and of `"decoder_token_ids"`,
            integers `(B, T)`.
        training: Whether dropout is active.

    Returns:
        Logits `(B, T, V)`.
    """

    def __init__(
        self,
        encoder,
        vocabulary_size,
        num_layers,
        num_query_heads,
        hidden_dim,
        intermediate_dim,
        num_key_value_heads=None,
        head_dim=None,
        max_sequence_length=1024,
        max_encoder_length=None,
        encoder_vocabulary_size=None,
        normalization="layer_norm",
        layer_norm_epsilon=1e-5,
        normalize_first=True,
        activation="gelu",
        gated_feedforward=False,
        use_bias=True,
        use_embedding_norm=False,
        use_final_norm=True,
        dropout=0.0,
        tokenizer=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        names = getattr(encoder, "input", None)
        if not isinstance(encoder, keras.Model) or not isinstance(names, dict):
            raise TypeError(
                "`encoder` must be a functional `keras.Model` whose inputs are a "
                f"dictionary. Received: {encoder!r}"
            )
        self.encoder, self.encoder_inputs = encoder, sorted(names)
        self._config = dict(
            vocabulary_size=vocabulary_size,
            num_layers=num_layers,
            num_query_heads=num_query_heads,
            hidden_dim=hidden_dim,
            intermediate_dim=intermediate_dim,
            num_key_value_heads=num_key_value_heads or num_query_heads,
            head_dim=head_dim or hidden_dim // num_query_heads,
            max_sequence_length=max_sequence_length,
            max_encoder_length=max_encoder_length,
            encoder_vocabulary_size=encoder_vocabulary_size,
            normalization=normalization,
            layer_norm_epsilon=layer_norm_epsilon,
            normalize_first=normalize_first,
            activation=activation,
            gated_feedforward=gated_feedforward,
            use_bias=use_bias,
            use_embedding_norm=use_embedding_norm,
            use_final_norm=use_final_norm,
            dropout=dropout,
        )
        for name, value in self._config.items():
            setattr(self, name, value)
        # Each position has an embedding, so there is an end to them.
        self.position_embedding = "learned"
        self.tokenizer = tokenizer
        self._generator = None
        self._create_layers()
        # All shapes are known, so that weights can be loaded before any call.
        self.build()

    def _create_layers(self):
        """Makes the decoder's layers, those apart that were given by `adopt`."""
        embedding = functools.partial(
            keras.layers.Embedding, output_dim=self.hidden_dim, dtype=self.dtype_policy
        )
        norm = functools.partial(
            make_normalization,
            self.normalization,
            self.layer_norm_epsilon,
            dtype=self.dtype_policy,
        )
        self.token_embedding = self._part(
            "token_embedding",
            lambda: keras.layers.ReversibleEmbedding(
                self.vocabulary_size,
                self.hidden_dim,
                dtype=self.dtype_policy,
                name="token_embedding",
            ),
        )
        self.position_table = self._part(
            "position_table",
            lambda: embedding(self.max_sequence_length, name="position_embedding"),
        )
        self.embedding_norm = self.final_norm = None
        if self.use_embedding_norm:
            self.embedding_norm = self._part(
                "embedding_norm", lambda: norm("embedding_norm")
            )
        self.embedding_dropout = keras.layers.Dropout(
            self.dropout, dtype=self.dtype_policy
        )
        self.blocks = [
            self._part(f"block_{i}", functools.partial(self._make_block, i))
            for i in range(self.num_layers)
        ]
        if self.use_final_norm:
            self.final_norm = self._part("final_norm", lambda: norm("final_norm"))

    def _make_block(self, index):
        options = {name: self._config[name] for name in BLOCK_OPTIONS}
        return DecoderBlock(**options, dtype=self.dtype_policy, name=f"block_{index}")

    def build(self, input_shape=None):
        """Creates all weights; the shape of the input doesn't matter."""
        shape = (None, None, self.hidden_dim)
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

    def call(self, inputs, training=None):
        """See the class."""
        encoder_inputs = {name: inputs[name] for name in self.encoder_inputs}
        sequence = self.encoder(encoder_inputs, training=training)
        mask = encoder_inputs.get(PADDING_MASK)
        x = self._embed(inputs[DECODER_IDS], 0, training)
        for block in self.blocks:
            x = block(x, sequence, encoder_padding_mask=mask, training=training)
        return self.logits(self._finish(x))

    @property
    def call_inputs(self):
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

    def _embed(self, token_ids, index, training=None):
        self._check_positions(DECODER_IDS, token_ids.shape[1], index)
        positions = token_positions(index, ops.shape(token_ids)[1])
        # Padding may reach past the last position that the model knows.
        positions = ops.minimum(positions, self.max_sequence_length - 1)
        x = self.token_embedding(token_ids) + self.position_table(positions)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        return self.embedding_dropout(x, training=training)

    def _finish(self, x):
        return x if self.final_norm is None else self.final_norm(x)

    def get_config(self):
        """Constructor arguments, the tokenizer excepted."""
        encoder = keras.saving.serialize_keras_object(self.encoder)
        return {**super().get_config(), **self._config, "encoder": encoder}

    @classmethod
    def from_config(cls, config):
        """The model that `get_config` describes."""
        encoder = keras.saving.deserialize_keras_object(config["encoder"])
        model = cls(**{**config, "encoder": encoder})
        # Configs of Keras' own attention, as in an encoder, don't say it.
        quantize_built(model, config.get(QUANTIZATION, {}))
        return model
