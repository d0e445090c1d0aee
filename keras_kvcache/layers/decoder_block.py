"""One block of a decoder: attention, optionally cross-attention, feed-forward."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from keras_kvcache.caches import CacheSpec
from keras_kvcache.layers.activations import get_activation
from keras_kvcache.layers.adoption import AdoptsParts
from keras_kvcache.layers.block_checks import check_encoder
from keras_kvcache.layers.block_config import BlockConfig, check_choice
from keras_kvcache.layers.cached_multi_head_attention import CachedMultiHeadAttention
from keras_kvcache.layers.config_arguments import (
    has_fields_of,
    read_config,
    shows_fields_of,
)
from keras_kvcache.layers.feed_forward import make_feedforward
from keras_kvcache.layers.initializers import clone_initializer
from keras_kvcache.layers.normalization import make_normalization

# What attends, by its name in a `BlockConfig`: layers with the constructor and the call
# of `CachedMultiHeadAttention`, and with its `cache_spec`.
ATTENTION_KINDS = {"multi_head": CachedMultiHeadAttention}


@keras.saving.register_keras_serializable(package="keras_kvcache")
@has_fields_of(BlockConfig)
class DecoderBlock(AdoptsParts):
    """A transformer decoder block with caches.

    Each part normalizes its input, and its output is added to it: causal
    self-attention, attention over an encoder's output if the block is built with
    one, feed-forward.

    Args:
        num_query_heads: `N`.
        intermediate_dim: Width of the feed-forward part.
        num_key_value_heads: `K`; `None` for `N`.
        head_dim: `H`; `None` for `D / N`.
        normalization: `"rms_norm"`, `"unit_offset_rms_norm"` or `"layer_norm"`.
        layer_norm_epsilon: Epsilon of the normalization.
        activation: Activation of the feed-forward part.
        gated_feedforward: Whether the feed-forward part is gated.
        use_bias: Whether projections and dense layers have biases.
        attention_bias: Whether the projections to queries, keys and values have
            them; `None` for `use_bias`.
        sliding_window: `W` of self-attention, or `None`.
        query_scale: Factor of the attention scores; `None` for `H ** -0.5`.
        logit_soft_cap: Soft cap of the attention scores, or `None`.
        query_key_norm: Whether queries and keys of self-attention are normalized,
            head by head.
        query_key_norm_epsilon: Epsilon of that; `None` for `layer_norm_epsilon`.
        use_post_attention_norm, use_post_ffw_norm: Whether what self-attention,
            or the feed-forward part, gives is normalized before it is added.
        num_experts, num_experts_per_token: Those of `MixtureOfExperts`; `None`
            for a plain feed-forward part.
        rotary_embedding: Layer for `CachedMultiHeadAttention`, or `None`.
        dropout: Rate on attention weights and on each part's output.
        kernel_initializer: Initializer of all kernels.
        normalize_first: Whether a part's input is normalized. If not it's the sum
            of its input and its output (Vaswani et al., 2017,
            https://arxiv.org/abs/1706.03762).
        attention_kind: What attends: `"multi_head"`, a `CachedMultiHeadAttention`.
        score_bias, use_sink_logits: Those of `CachedMultiHeadAttention`, for
            self-attention.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        decoder_sequence: `(B, T, D)`.
        encoder_sequence: `(B, S', D')`, or `None` for a block without
            cross-attention. Once `cross_attention_cache` is filled it isn't
            read any more.
        encoder_padding_mask: `(B, S')`, `False` for encoder positions to hide.
        self_attention_cache: Cache of this block, dense or an object, or `None`.
        self_attention_cache_update_index: As in `CachedMultiHeadAttention`.
        cross_attention_cache: Cache of `S'` slots for the encoder's projections.
        cross_attention_cache_update_index: 0 to fill that cache in this call;
            `None` to read it only.
        training: Whether dropout is active.
        mask, decoder_sequence_mask, encoder_sequence_mask: Boolean `(B, T)` and,
            of the encoder, `(B, S')`, which Keras fills in from masks that the
            inputs carry: `mask` where `decoder_sequence` is the only input.

    Returns:
        `output`, `(output, self_attention_cache)` or `(output,
        self_attention_cache, cross_attention_cache)`, by which caches were given;
        `output` is `(B, T, D)`.

    Raises:
        ValueError: A block built with an encoder is called without, or the other
            way round, or `CachedMultiHeadAttention` refuses a cache or an index.
    """

    @shows_fields_of(BlockConfig)
    def __init__(
        self,
        *values: Any,
        rotary_embedding: keras.layers.Layer | None = None,
        kernel_initializer: Any = "glorot_uniform",
        **options: Any,
    ) -> None:
        config, options = read_config(BlockConfig, values, options)
        super().__init__(**options)
        # Caches keep their own dtype.
        self.autocast = False
        self.supports_masking = True
        self.config = config
        check_choice(config, "attention_kind", ATTENTION_KINDS)
        self.rotary_embedding = rotary_embedding
        self.kernel_initializer = keras.initializers.get(kernel_initializer)

    @property
    def activation(self) -> Callable:
        """The function that `config.activation` stands for."""
        return get_activation(self.config.activation)

    def build(
        self,
        decoder_sequence_shape: Sequence[int | None],
        encoder_sequence_shape: Sequence[int | None] | None = None,
    ) -> None:
        """Creates the parts; cross-attention if there is an encoder's shape."""
        shape = decoder_sequence_shape
        head_dim = self.config.head_dim or shape[-1] // self.config.num_query_heads
        if self.config.head_dim is None and shape[-1] % self.config.num_query_heads:
            raise ValueError(
                "`head_dim` must be given where the width D isn't a multiple of "
                f"`num_query_heads`. Received: D={shape[-1]}, "
                f"num_query_heads={self.config.num_query_heads}"
            )
        self.attention_norm = self._norm("attention_norm", shape)
        self.attention = self._part(
            "attention", lambda: self._self_attention(shape, head_dim), shape, shape
        )
        self.post_attention_norm = None
        if self.config.use_post_attention_norm:
            self.post_attention_norm = self._norm("post_attention_norm", shape)
        self.cross_attention = None
        if encoder_sequence_shape is not None:
            self.cross_attention_norm = self._norm("cross_attention_norm", shape)
            self.cross_attention = self._part(
                "cross_attention",
                lambda: self._attention("cross_attention", head_dim),
                shape,
                encoder_sequence_shape,
            )
        self.feedforward_norm = self._norm("feedforward_norm", shape)
        self.feedforward = self._part("feedforward", self._make_feedforward, shape)
        self.post_ffw_norm = None
        if self.config.use_post_ffw_norm:
            self.post_ffw_norm = self._norm("post_ffw_norm", shape)
        self.residual_dropout = keras.layers.Dropout(
            self.config.dropout, dtype=self.dtype_policy, name="residual_dropout"
        )

    def _norm(self, name, shape, epsilon=None):
        if epsilon is None:
            epsilon = self.config.layer_norm_epsilon
        return self._part(
            name,
            lambda: make_normalization(
                self.config.normalization, epsilon, name, self.dtype_policy
            ),
            shape,
        )

    def _self_attention(self, shape, head_dim):
        norms = {}
        if self.config.query_key_norm:
            shape, epsilon = (*shape[:-1], head_dim), self.config.query_key_norm_epsilon
            norms["query_norm"] = self._norm("query_norm", shape, epsilon)
            norms["key_norm"] = self._norm("key_norm", shape, epsilon)
        return self._attention(
            "attention",
            head_dim,
            sliding_window=self.config.sliding_window,
            rotary_embedding=self.rotary_embedding,
            score_bias=self.config.score_bias,
            use_sink_logits=self.config.use_sink_logits,
            **norms,
        )

    def _attention(self, name, head_dim, **kwargs):
        return ATTENTION_KINDS[self.config.attention_kind](
            self.config.num_query_heads,
            head_dim,
            num_key_value_heads=self.config.num_key_value_heads,
            use_bias=self.config.attention_bias,
            use_output_bias=self.config.use_bias,
            dropout=self.config.dropout,
            query_scale=self.config.query_scale,
            logit_soft_cap=self.config.logit_soft_cap,
            kernel_initializer=clone_initializer(self.kernel_initializer),
            dtype=self.dtype_policy,
            name=name,
            **kwargs,
        )

    def _make_feedforward(self):
        return make_feedforward(
            self.config.intermediate_dim,
            num_experts=self.config.num_experts,
            num_experts_per_token=self.config.num_experts_per_token,
            activation=self.activation,
            gated=self.config.gated_feedforward,
            use_bias=self.config.use_bias,
            kernel_initializer=clone_initializer(self.kernel_initializer),
            dtype=self.dtype_policy,
            name="feedforward",
        )

    def cache_spec(
        self,
        batch_size: int,
        capacity: int,
        codec: Any = None,
        kind: Any = "auto",
        layout: str = "head_major",
    ) -> CacheSpec:
        """The spec of a cache for self-attention, as the attention layer says it.

        Args:
            batch_size, capacity, codec, kind, layout: As in
                `CachedMultiHeadAttention.cache_spec`.
        """
        return self.attention.cache_spec(batch_size, capacity, codec, kind, layout)

    def call(
        self,
        decoder_sequence: Any,
        encoder_sequence: Any = None,
        encoder_padding_mask: Any = None,
        self_attention_cache: Any = None,
        self_attention_cache_update_index: Any = None,
        cross_attention_cache: Any = None,
        cross_attention_cache_update_index: Any = None,
        training: bool | None = None,
        mask: Any = None,
        decoder_sequence_mask: Any = None,
        encoder_sequence_mask: Any = None,
    ) -> Any:
        """Runs attention, cross-attention if built, and the feed-forward part."""
        check_encoder(
            self.cross_attention is not None,
            encoder_sequence=encoder_sequence,
            encoder_padding_mask=encoder_padding_mask,
            cross_attention_cache=cross_attention_cache,
            cross_attention_cache_update_index=cross_attention_cache_update_index,
        )
        x = ops.cast(decoder_sequence, self.compute_dtype)
        if decoder_sequence_mask is None:
            decoder_sequence_mask = mask
        if decoder_sequence_mask is not None:
            # A copy carries no mask, of which Keras' RMSNormalization would warn.
            x = ops.copy(x)
        normed = self.attention_norm(x) if self.config.normalize_first else x
        attended, self_attention_cache = _with_cache(
            self.attention(
                normed,
                normed,
                cache=self_attention_cache,
                cache_update_index=self_attention_cache_update_index,
                use_causal_mask=True,
                training=training,
                query_mask=decoder_sequence_mask,
                value_mask=decoder_sequence_mask,
            ),
            self_attention_cache,
        )
        x = self._add(
            x, attended, self.attention_norm, training, self.post_attention_norm
        )
        if self.cross_attention is not None:
            normed = self.cross_attention_norm(x) if self.config.normalize_first else x
            padding = encoder_padding_mask
            reads_only = cross_attention_cache_update_index is None
            if padding is None and cross_attention_cache is not None and reads_only:
                padding = encoder_sequence_mask
            attended, cross_attention_cache = _with_cache(
                self.cross_attention(
                    normed,
                    encoder_sequence,
                    attention_mask=None if padding is None else padding[:, None, :],
                    cache=cross_attention_cache,
                    cache_update_index=cross_attention_cache_update_index,
                    training=training,
                    query_mask=decoder_sequence_mask,
                    value_mask=encoder_sequence_mask,
                ),
                cross_attention_cache,
            )
            x = self._add(x, attended, self.cross_attention_norm, training)
        fed = self.feedforward(
            self.feedforward_norm(x) if self.config.normalize_first else x
        )
        x = self._add(x, fed, self.feedforward_norm, training, self.post_ffw_norm)

        caches = (self_attention_cache, cross_attention_cache)
        caches = tuple(cache for cache in caches if cache is not None)
        return (x, *caches) if caches else x

    def _add(self, x, change, norm, training, post_norm=None):
        """Adds a part's output to its input; post-norm blocks normalize the sum."""
        if post_norm is not None:
            change = post_norm(change)
        x = x + self.residual_dropout(change, training=training)
        return x if self.config.normalize_first else norm(x)

    def compute_output_spec(
        self,
        decoder_sequence: Any,
        encoder_sequence: Any = None,
        encoder_padding_mask: Any = None,
        self_attention_cache: Any = None,
        self_attention_cache_update_index: Any = None,
        cross_attention_cache: Any = None,
        cross_attention_cache_update_index: Any = None,
        **unused: Any,
    ) -> Any:
        """Shapes and dtypes of what a call returns."""
        check_encoder(
            self.cross_attention is not None,
            encoder_sequence=encoder_sequence,
            encoder_padding_mask=encoder_padding_mask,
            cross_attention_cache=cross_attention_cache,
            cross_attention_cache_update_index=cross_attention_cache_update_index,
        )
        x = keras.KerasTensor(decoder_sequence.shape, self.compute_dtype)
        returned = (x,)
        attended = self.attention.compute_output_spec(
            x,
            x,
            cache=self_attention_cache,
            cache_update_index=self_attention_cache_update_index,
        )
        if self_attention_cache is not None:
            returned += attended[1:]
        if self.cross_attention is not None:
            attended = self.cross_attention.compute_output_spec(
                x,
                encoder_sequence,
                cache=cross_attention_cache,
                cache_update_index=cross_attention_cache_update_index,
            )
            if cross_attention_cache is not None:
                returned += attended[1:]
        return returned if len(returned) > 1 else x

    def get_config(self) -> dict[str, Any]:
        """Constructor arguments."""
        rotary = self.rotary_embedding
        return {
            **super().get_config(),
            **self.config.to_dict(),
            "rotary_embedding": rotary and keras.saving.serialize_keras_object(rotary),
            "activation": keras.activations.serialize(self.activation),
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "DecoderBlock":
        """The block that `get_config` describes."""
        config = dict(config)
        if isinstance(config.get("rotary_embedding"), dict):
            config["rotary_embedding"] = keras.saving.deserialize_keras_object(
                config["rotary_embedding"]
            )
        return cls(**config)


def _with_cache(returned, cache):
    """`(output, cache)` from what attention returned with or without a cache."""
    return returned if cache is not None else (returned, None)
