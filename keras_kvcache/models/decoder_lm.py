"""A decoder language model."""

import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import keras
from keras import ops

from keras_kvcache.attention import token_positions
from keras_kvcache.layers import DecoderBlock, RotaryEmbedding
from keras_kvcache.layers.config_arguments import (
    has_fields_of,
    read_config,
    shows_fields_of,
)
from keras_kvcache.layers.initializers import get_initializer
from keras_kvcache.layers.normalization import make_normalization
from keras_kvcache.models.decoder_config import DecoderConfig
from keras_kvcache.models.exporting import token_ids_input
from keras_kvcache.models.language_model import LanguageModel
from keras_kvcache.models.own_copy import own_copy
from keras_kvcache.models.preset_kinds import load_preset
from keras_kvcache.models.presets import save_preset


@keras.saving.register_keras_serializable(package="keras_kvcache")
@has_fields_of(DecoderConfig)
class DecoderLM(LanguageModel):
    """Token ids in, logits out: embedding, blocks, final norm, projection.

    The defaults are a Llama's with tied embeddings (Touvron et al., 2023,
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
            num_experts, num_experts_per_token, attention_kind, score_bias,
            use_sink_logits: Those of `keras_kvcache.layers.DecoderBlock`, the same in
            all blocks.
        final_norm_epsilon: Epsilon of the normalization after the blocks; `None`
            for `layer_norm_epsilon`.
        position_embedding: `"rotary"`, `"learned"`, or `"none"` where only masks and
            `score_bias` tell positions apart.
        rope_max_wavelength, rope_position_scaling_factor,
            rope_frequency_factors, rotary_dim: `max_wavelength`,
            `scaling_factor`, `frequency_factors` and `rotary_dim` of
            `keras_kvcache.layers.RotaryEmbedding`.
        rope_local_max_wavelength, rope_local_position_scaling_factor: Those of
            layers with a sliding window, if they differ from the others'.
        embedding_scale: Factor of the token embeddings, or `None`.
        tie_word_embeddings: Whether the logits use the embedding's weights.
        sliding_window: `W`, or `None`.
        sliding_window_pattern: `n`: layers `n`, `2n`, `3n`, …, counted from one,
            have no window; `None` for a window in all layers.
        attention_logit_soft_cap, final_logit_soft_cap: Soft caps of attention
            scores and of logits, or `None`.
        dropout: Rate after the embedding, on attention weights and on each
            part's output.
        kernel_initializer: Initializer of kernels and embeddings; `None` for a
            normal distribution of deviation 0.02.
        tokenizer: Object with `encode(text) -> ids`, `decode(ids) -> text` and
            `stop_token_ids`, for text in and out. It isn't part of the config; it's
            saved beside it, as `keras_kvcache.models.tokenizer_files` says.
        has_last_position: Whether positions at or past `max_sequence_length` are
            refused; `None` to refuse learned ones only. Each of these has an embedding,
            while a rotation may go on.
        layer_options: Where layers differ in more than their windows: one dictionary a
            layer, empty or with fields of its `keras_kvcache.models.LayerConfig`, such
            as `{"head_dim": 32}`. `"rope"` is a dictionary of arguments of
            `RotaryEmbedding`, or `None` for a layer that knows no positions.
        parts: Built layers of another model that this one shares, by the names of its
            attributes, blocks as `"block_0"` and so on: a layer, or a dictionary of
            parts of it. What isn't named is made. It isn't part of the config: what is
            saved has layers of its own.
        **kwargs: Arguments of `keras.Model`, such as `dtype` and `name`. Without
            `jax_enable_x64` JAX has no float64: as in any Keras model it then warns,
            and weights, caches and answers are those of float32.

    Call arguments:
        token_ids: Integer tensor `(B, T)`.
        training: Whether dropout is active.

    Returns:
        Logits `(B, T, V)`.
    """

    config: DecoderConfig
    _saved_by = "use `save_to_preset` on it"

    @shows_fields_of(DecoderConfig)
    def __init__(
        self,
        *sizes: Any,
        kernel_initializer: Any = None,
        tokenizer: Any = None,
        parts: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        config, options = read_config(DecoderConfig, sizes, options)
        super().__init__(config, tokenizer=tokenizer, parts=parts, **options)
        self.kernel_initializer = get_initializer(kernel_initializer)
        self._create_layers()
        # All shapes are known, so that weights can be loaded before any call.
        self.build((None, None))

    def _create_layers(self):
        """Makes the layers that aren't among `parts`."""
        config = self.config
        self.token_embedding = self._part("token_embedding", self._make_embedding)
        self.position_table = None
        if config.position_embedding == "learned":
            self.position_table = self._part("position_table", self._make_positions)
        self.embedding_dropout = keras.layers.Dropout(
            config.dropout, dtype=self.dtype_policy
        )
        self.blocks = [
            self._part(f"block_{i}", functools.partial(self._make_block, i, layer))
            for i, layer in enumerate(config.layers)
        ]
        self.final_norm = self._part("final_norm", self._make_final_norm)

    def _make_embedding(self):
        config = self.config
        return keras.layers.ReversibleEmbedding(
            config.vocabulary_size,
            config.hidden_dim,
            tie_weights=config.tie_word_embeddings,
            embeddings_initializer=self.kernel_initializer,
            logit_soft_cap=config.final_logit_soft_cap,
            dtype=self.dtype_policy,
            name="token_embedding",
        )

    def _make_positions(self):
        return keras.layers.Embedding(
            self.config.max_sequence_length,
            self.config.hidden_dim,
            embeddings_initializer=self.kernel_initializer,
            dtype=self.dtype_policy,
            name="position_embedding",
        )

    def _make_final_norm(self):
        return make_normalization(
            self.config.normalization,
            self.config.final_norm_epsilon,
            "final_norm",
            self.dtype_policy,
        )

    def _make_block(self, index, layer):
        options, rotary = dict(vars(layer)), None
        rope = options.pop("rope")
        if rope is not None:
            rotary = RotaryEmbedding(
                **vars(rope), dtype=self.dtype_policy, name="rotary_embedding"
            )
        return DecoderBlock(
            **options,
            rotary_embedding=rotary,
            kernel_initializer=self.kernel_initializer,
            dtype=self.dtype_policy,
            name=f"block_{index}",
        )

    def build(self, input_shape: Sequence[int | None]) -> None:
        """Creates all weights; the shape of the input doesn't matter."""
        hidden_shape = (*input_shape, self.config.hidden_dim)
        layers = [(self.token_embedding, input_shape)]
        if self.position_table is not None:
            layers.append((self.position_table, input_shape))
        layers += [(layer, hidden_shape) for layer in (*self.blocks, self.final_norm)]
        for layer, shape in layers:
            if not layer.built:
                layer.build(shape)
        self.built = True

    def call(self, token_ids: Any, training: bool | None = None) -> Any:
        """Logits `(B, T, V)` of token ids `(B, T)`, without a cache."""
        x = self._embed(token_ids, 0, training)
        for block in self.blocks:
            x = block(x, training=training)
        return self.logits(self.final_norm(x))

    @property
    def call_inputs(self) -> Any:
        """The input of `call`, a symbolic tensor."""
        return token_ids_input("token_ids")

    def _run_with_cache(self, token_ids, cache, cache_update_index, run_block):
        """`hidden_with_cache` with a function that calls the blocks."""
        if not isinstance(cache, (list, tuple)) or len(cache) != len(self.blocks):
            given = len(cache) if isinstance(cache, (list, tuple)) else type(cache)
            raise ValueError(
                "`cache` must be a list or tuple of one cache a layer, as "
                f"`init_cache` gives it: {len(self.blocks)}. Received: {given}"
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
        if self.config.embedding_scale is not None:
            x = x * ops.cast(self.config.embedding_scale, x.dtype)
        self._check_positions("token_ids", token_ids.shape[1], index)
        if self.position_table is not None:
            positions = token_positions(index, ops.shape(token_ids)[1])
            # Padding may reach past the last position that the model knows.
            positions = ops.minimum(positions, self.config.max_sequence_length - 1)
            x = x + self.position_table(positions)
        return self.embedding_dropout(x, training=training)

    def compile(
        self,
        optimizer: Any = "auto",
        loss: Any = "auto",
        *,
        weighted_metrics: Any = "auto",
        sampler: Any = "greedy",
        **kwargs: Any,
    ) -> None:
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

    def compile_from_config(self, config: Any) -> None:
        """Compiles a loaded model as the saved one was, but for the sampler."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        self.optimizer.build(self.trainable_variables)

    def get_config(self) -> dict[str, Any]:
        """Constructor arguments, the tokenizer excepted."""
        return {
            **super().get_config(),
            **self.config.to_dict(),
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
        }

    def _to_save(self):
        return own_copy(self) if self._parts else self

    @classmethod
    def from_preset(
        cls, preset: str | os.PathLike, load_weights: bool = True, **kwargs: Any
    ) -> "DecoderLM":
        """Makes a model that was published or saved.

        Args:
            preset: One of

                - a name of this package's, such as `"smollm2_135m_instruct"`,
                  which is fetched once and kept;
                - the path of a GGUF file, or of a Hugging Face folder:
                  `config.json`, safetensors and perhaps a tokenizer. Its family
                  must have a file in `keras_kvcache/families`; an error lists
                  them. No code in a folder is run, and no pickle is read;
                - the path of a folder that `save_to_preset` wrote, this one or
                  keras-hub's;
                - where keras-hub is installed, any other name or handle that
                  `keras_hub.models.CausalLM.from_preset` takes, such as
                  `"gpt2_base_en"`, `"hf://user/model"` or `"kaggle://…"`. keras-hub
                  fetches and loads it, and `from_keras_hub` takes its weights
                  over.
            load_weights: Whether to load weights, or to leave them random.
            **kwargs: Constructor arguments that take the place of the preset's,
                such as `dtype="bfloat16"`. The dtype of a GGUF file or a Hugging
                Face folder is by default bfloat16 on an accelerator and float32
                on a CPU; that of our own folder is that of the model it was saved
                from, and that of a keras-hub model what keras-hub chooses. Of a
                keras-hub model only `dtype`, `max_sequence_length` and
                `tokenizer` can be changed.

        Returns:
            The model, with its tokenizer if there is one. It is of this class; one
            made of a keras-hub model shares its layers.

        Raises:
            FileNotFoundError: A file is missing.
            ImportError: keras-hub is needed and isn't installed.
            ValueError: The name is unknown, or a file is damaged or of a kind
                that can't be loaded, or an argument can't be honoured; the
                message says why.
            keras_kvcache.loaders.DownloadError: A model can't be fetched.
        """
        return load_preset(cls, preset, load_weights, kwargs)

    def save_to_preset(self, directory: str | os.PathLike) -> None:
        """Writes config, weights and tokenizer into a folder.

        Everything is written beside the folder first and moved there when it is
        complete, so that an error leaves an earlier preset as it was. Layers that are
        shared with another model are written as own ones.

        Args:
            directory: The folder; made if need be. An earlier preset in it is
                replaced.

        Raises:
            TypeError: The config holds something that JSON can't.
        """
        save_preset(self._to_save(), directory)
