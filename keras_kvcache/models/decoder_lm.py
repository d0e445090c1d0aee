"""A decoder language model."""

import functools

import keras
from keras import ops

from keras_kvcache.layers import DecoderBlock, RotaryEmbedding
from keras_kvcache.layers.adoption import AdoptsParts
from keras_kvcache.layers.normalization import make_normalization
from keras_kvcache.models.decoder_config import (
    complete_config,
    get_initializer,
    window_of_layer,
)
from keras_kvcache.models.decoding import DecodingMethods
from keras_kvcache.models.exporting import Exports, token_ids_input
from keras_kvcache.models.presets import PresetMethods
from keras_kvcache.models.tokenizer_files import KeepsTokenizer
from keras_kvcache.ops import token_positions

# Arguments that a model hands on to all its blocks as they are.
BLOCK_OPTIONS = (
    "num_query_heads",
    "intermediate_dim",
    "num_key_value_heads",
    "head_dim",
    "normalization",
    "layer_norm_epsilon",
    "activation",
    "gated_feedforward",
    "use_bias",
    "attention_bias",
    "query_scale",
    "query_key_norm",
    "query_key_norm_epsilon",
    "use_post_attention_norm",
    "use_post_ffw_norm",
    "num_experts",
    "num_experts_per_token",
    "dropout",
)


@keras.saving.register_keras_serializable(package="keras_kvcache")
class DecoderLM(
    PresetMethods, DecodingMethods, KeepsTokenizer, Exports, AdoptsParts, keras.Model
):
    """Token ids in, logits out: embedding, blocks, final norm, projection.

    The defaults are a Llama's (Touvron et al., 2023,
    https://arxiv.org/abs/2302.13971). GPT-2 (Radford et al., 2019) is
    `normalization="layer_norm"`, `position_embedding="learned"`,
    `activation="gelu_tanh"`, `gated_feedforward=False`, `use_bias=True`.

    Args:
        vocabulary_size: `V`.
        num_layers: `L`.
        num_query_heads: `N`.
        hidden_dim: `D`.
        intermediate_dim: Width of the feed-forward parts.
        num_key_value_heads: `K`; `None` for `N`.
        head_dim: `H`; `None` for `D / N`.
        max_sequence_length: The most positions that the model can tell apart.
        normalization, layer_norm_epsilon, activation, gated_feedforward,
            use_bias, attention_bias, query_scale, query_key_norm,
            query_key_norm_epsilon, use_post_attention_norm, use_post_ffw_norm,
            num_experts, num_experts_per_token: Those of
            `keras_kvcache.layers.DecoderBlock`, the same in all blocks.
        final_norm_epsilon: Epsilon of the normalization after the blocks; `None`
            for `layer_norm_epsilon`.
        position_embedding: `"rotary"` or `"learned"`.
        rope_max_wavelength, rope_position_scaling_factor,
            rope_frequency_factors, rotary_dim: `max_wavelength`,
            `scaling_factor`, `frequency_factors` and `rotary_dim` of
            `keras_kvcache.layers.RotaryEmbedding`.
        rope_local_max_wavelength, rope_local_position_scaling_factor: Those of
            layers with a sliding window, if they differ from the others'.
        embedding_scale: Factor of the token embeddings, or `None`.
        tie_word_embeddings: Whether the logits use the embedding's weights.
        sliding_window: `W`, or `None`.
        sliding_window_pattern: Every layer of a number divisible by it, counted
            from one, attends everything; `None` for a window in all layers.
        attention_logit_soft_cap, final_logit_soft_cap: Soft caps of attention
            scores and of logits, or `None`.
        dropout: Rate after the embedding, on attention weights and on each
            part's output.
        kernel_initializer: Initializer of kernels and embeddings; `None` for a
            normal distribution of deviation 0.02.
        tokenizer: Object with `encode(text) -> ids`, `decode(ids) -> text` and
            `stop_token_ids`, for text in and out. It isn't part of the config; it's
            saved beside it, as `keras_kvcache.models.tokenizer_files` says.
        **kwargs: Arguments of `keras.Model`, such as `dtype` and `name`. Without
            `jax_enable_x64` JAX has no float64: as in any Keras model it then warns,
            and weights, caches and answers are those of float32.

    Call arguments:
        token_ids: Integer tensor `(B, T)`.
        training: Whether dropout is active.

    Returns:
        Logits `(B, T, V)`.
    """

    def __init__(
        self,
        vocabulary_size,
        num_layers,
        num_query_heads,
        hidden_dim,
        intermediate_dim,
        num_key_value_heads=None,
        head_dim=None,
        max_sequence_length=1024,
        normalization="rms_norm",
        layer_norm_epsilon=1e-5,
        activation="silu",
        gated_feedforward=True,
        use_bias=False,
        attention_bias=None,
        query_scale=None,
        query_key_norm=False,
        query_key_norm_epsilon=None,
        use_post_attention_norm=False,
        use_post_ffw_norm=False,
        num_experts=None,
        num_experts_per_token=None,
        final_norm_epsilon=None,
        position_embedding="rotary",
        rope_max_wavelength=10000.0,
        rope_position_scaling_factor=1.0,
        rope_frequency_factors=None,
        rotary_dim=None,
        rope_local_max_wavelength=None,
        rope_local_position_scaling_factor=1.0,
        embedding_scale=None,
        tie_word_embeddings=True,
        sliding_window=None,
        sliding_window_pattern=None,
        attention_logit_soft_cap=None,
        final_logit_soft_cap=None,
        dropout=0.0,
        kernel_initializer=None,
        tokenizer=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self._config = dict(
            vocabulary_size=vocabulary_size,
            num_layers=num_layers,
            num_query_heads=num_query_heads,
            hidden_dim=hidden_dim,
            intermediate_dim=intermediate_dim,
            num_key_value_heads=num_key_value_heads,
            head_dim=head_dim,
            max_sequence_length=max_sequence_length,
            normalization=normalization,
            layer_norm_epsilon=layer_norm_epsilon,
            activation=activation,
            gated_feedforward=gated_feedforward,
            use_bias=use_bias,
            attention_bias=attention_bias,
            query_scale=query_scale,
            query_key_norm=query_key_norm,
            query_key_norm_epsilon=query_key_norm_epsilon,
            use_post_attention_norm=use_post_attention_norm,
            use_post_ffw_norm=use_post_ffw_norm,
            num_experts=num_experts,
            num_experts_per_token=num_experts_per_token,
            final_norm_epsilon=final_norm_epsilon,
            position_embedding=position_embedding,
            rope_max_wavelength=rope_max_wavelength,
            rope_position_scaling_factor=rope_position_scaling_factor,
            rope_frequency_factors=rope_frequency_factors,
            rotary_dim=rotary_dim,
            rope_local_max_wavelength=rope_local_max_wavelength,
            rope_local_position_scaling_factor=rope_local_position_scaling_factor,
            embedding_scale=embedding_scale,
            tie_word_embeddings=tie_word_embeddings,
            sliding_window=sliding_window,
            sliding_window_pattern=sliding_window_pattern,
            attention_logit_soft_cap=attention_logit_soft_cap,
            final_logit_soft_cap=final_logit_soft_cap,
            dropout=dropout,
        )
        complete_config(self._config)
        self.kernel_initializer = get_initializer(kernel_initializer)
        for name, value in self._config.items():
            setattr(self, name, value)
        self.tokenizer = tokenizer
        self._generator = None
        self._create_layers()
        # All shapes are known, so that weights can be loaded before any call.
        self.build((None, None))

    def _create_layers(self):
        """Makes the layers, those apart that were given by `adopt`."""
        self.token_embedding = self._part("token_embedding", self._make_embedding)
        if self.position_embedding == "learned":
            self.position_table = self._part("position_table", self._make_positions)
        self.embedding_dropout = keras.layers.Dropout(
            self.dropout, dtype=self.dtype_policy
        )
        self.blocks = [
            self._part(f"block_{i}", functools.partial(self._make_block, i))
            for i in range(self.num_layers)
        ]
        self.final_norm = self._part(
            "final_norm",
            lambda: make_normalization(
                self.normalization,
                self.final_norm_epsilon,
                "final_norm",
                self.dtype_policy,
            ),
        )

    def _make_embedding(self):
        return keras.layers.ReversibleEmbedding(
            self.vocabulary_size,
            self.hidden_dim,
            tie_weights=self.tie_word_embeddings,
            embeddings_initializer=self.kernel_initializer,
            logit_soft_cap=self.final_logit_soft_cap,
            dtype=self.dtype_policy,
            name="token_embedding",
        )

    def _make_positions(self):
        return keras.layers.Embedding(
            self.max_sequence_length,
            self.hidden_dim,
            embeddings_initializer=self.kernel_initializer,
            dtype=self.dtype_policy,
            name="position_embedding",
        )

    def _make_block(self, index):
        sliding_window = window_of_layer(self._config, index)
        return DecoderBlock(
            sliding_window=sliding_window,
            logit_soft_cap=self.attention_logit_soft_cap,
            rotary_embedding=self._make_rotary(is_local=sliding_window is not None),
            kernel_initializer=self.kernel_initializer,
            dtype=self.dtype_policy,
            name=f"block_{index}",
            **{name: self._config[name] for name in BLOCK_OPTIONS},
        )

    def _make_rotary(self, is_local):
        if self.position_embedding != "rotary":
            return None
        if is_local and self.rope_local_max_wavelength is not None:
            options = dict(
                max_wavelength=self.rope_local_max_wavelength,
                scaling_factor=self.rope_local_position_scaling_factor,
            )
        else:
            options = dict(
                max_wavelength=self.rope_max_wavelength,
                scaling_factor=self.rope_position_scaling_factor,
                frequency_factors=self.rope_frequency_factors,
            )
        return RotaryEmbedding(
            rotary_dim=self.rotary_dim,
            dtype=self.dtype_policy,
            name="rotary_embedding",
            **options,
        )

    def build(self, input_shape):
        """Creates all weights; the shape of the input doesn't matter."""
        hidden_shape = (*input_shape, self.hidden_dim)
        layers = [(self.token_embedding, input_shape)]
        if self.position_embedding == "learned":
            layers.append((self.position_table, input_shape))
        layers += [(layer, hidden_shape) for layer in (*self.blocks, self.final_norm)]
        for layer, shape in layers:
            if not layer.built:
                layer.build(shape)
        self.built = True

    def call(self, token_ids, training=None):
        """See the class."""
        x = self._embed(token_ids, 0, training)
        for block in self.blocks:
            x = block(x, training=training)
        return self.logits(self.final_norm(x))

    @property
    def call_inputs(self):
        """The input of `call`, a symbolic tensor."""
        return token_ids_input("token_ids")

    def _run_with_cache(self, token_ids, cache, cache_update_index, run_block):
        """`hidden_with_cache` with a function that calls the blocks."""
        if not isinstance(cache, (list, tuple)) or len(cache) != self.num_layers:
            given = len(cache) if isinstance(cache, (list, tuple)) else type(cache)
            raise ValueError(
                "`cache` must be a list or tuple of one cache a layer, as "
                f"`init_cache` gives it: {self.num_layers}. Received: {given}"
            )
        x = self._embed(token_ids, cache_update_index)
        updated = []
        for block, layer_cache in zip(self.blocks, cache, strict=True):
            x, layer_cache = run_block(
                block,
                x,
                self_attention_cache=layer_cache,
                self_attention_cache_update_index=cache_update_index,
            )
            updated.append(layer_cache)
        return self.final_norm(x), tuple(updated)

    def _embed(self, token_ids, index, training=None):
        x = self.token_embedding(token_ids)
        if self.embedding_scale is not None:
            x = x * ops.cast(self.embedding_scale, x.dtype)
        self._check_positions("token_ids", token_ids.shape[1], index)
        if self.position_embedding == "learned":
            positions = token_positions(index, ops.shape(token_ids)[1])
            # Padding may reach past the last position that the model knows.
            positions = ops.minimum(positions, self.max_sequence_length - 1)
            x = x + self.position_table(positions)
        return self.embedding_dropout(x, training=training)

    def compile(
        self,
        optimizer="auto",
        loss="auto",
        *,
        weighted_metrics="auto",
        sampler="greedy",
        **kwargs,
    ):
        """As `keras.Model.compile`, with defaults for next-token training.

        Args:
            optimizer: `"auto"` is Adam with a learning rate of 2e-5.
            loss: `"auto"` is sparse categorical cross-entropy from logits.
            weighted_metrics: `"auto"` is sparse categorical accuracy.
            sampler: What `generate` and `stream` use unless told otherwise, as
                in `keras_kvcache.samplers.get`.
            **kwargs: Other arguments of `keras.Model.compile`.
        """
        if optimizer == "auto":
            optimizer = keras.optimizers.Adam(2e-5)
        if loss == "auto":
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        if weighted_metrics == "auto":
            weighted_metrics = [keras.metrics.SparseCategoricalAccuracy()]
        self.generator.sampler = sampler
        super().compile(
            optimizer=optimizer, loss=loss, weighted_metrics=weighted_metrics, **kwargs
        )

    def compile_from_config(self, config):
        """Compiles a loaded model as the saved one was, but for the sampler."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        self.optimizer.build(self.trainable_variables)

    def get_config(self):
        """Constructor arguments, the tokenizer excepted."""
        return {
            **super().get_config(),
            **self._config,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
        }
