"""Multi-head attention with a key/value cache."""

import functools
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_kvcache.attention import align_mask, attend_with_scores, token_positions
from keras_kvcache.caches import CacheSpec
from keras_kvcache.layers import attention_checks as checks
from keras_kvcache.layers.adoption import AdoptsParts
from keras_kvcache.layers.attention_cache_spec import attention_cache_spec
from keras_kvcache.layers.cached_attention import (
    attend_sequence,
    cached_attention,
    query_positions,
    update_and_mask,
)
from keras_kvcache.layers.foreign_arguments import ExplainsForeignArguments
from keras_kvcache.layers.foreign_files import ExplainsForeignFiles
from keras_kvcache.layers.output_spec import output_spec, results
from keras_kvcache.layers.projections import (
    make_output_projection,
    make_projection,
    project,
)
from keras_kvcache.layers.scoring import asked_of_scores, build_scoring, scoring_of


@keras.saving.register_keras_serializable(package="keras_kvcache")
class CachedMultiHeadAttention(
    ExplainsForeignArguments,
    ExplainsForeignFiles,
    AdoptsParts,
    keras.layers.MultiHeadAttention,
):
    """Multi-head attention that can keep its keys and values in a cache.

    Three modes, told apart by the call:

    1. No cache: plain multi-head attention.
    2. `cache` without `cache_update_index`: the cached projections are attended;
       `value` and `key` are ignored. This is how a decoder attends an encoder.
    3. `cache` and `cache_update_index`: `value` and `key` are projected, the new
       entries are written into the cache from the index on, then attention sees
       what the cache holds up to and including them.

    It has the weights of `keras.layers.MultiHeadAttention` (names, shapes and
    order), and stands in for keras-hub's layer of the same name.

    Letters: `B` batch, `T` query tokens, `S` cache slots, `D` width, `N` query
    heads, `K` key/value heads, `H` head size.

    Args:
        num_heads: `N`.
        key_dim: `H`, size of a query and key head.
        value_dim, dropout, use_bias, output_shape, attention_axes,
            sliding_window, use_gate, seed, kernel_initializer, bias_initializer,
            kernel_regularizer, bias_regularizer, activity_regularizer,
            kernel_constraint, bias_constraint: As in
            `keras.layers.MultiHeadAttention`. `attention_axes` other than axis 1
            can't be combined with a cache.
        flash_attention: As in Keras where there is no cache. With a cache the
            scores of a whole sequence never exist at once, whatever this says.
        num_key_value_heads: `K`, a divisor of `N`; query heads share key/value
            heads in groups of `N / K` (Ainslie et al., 2023,
            https://arxiv.org/abs/2305.13245). `None` for `N`.
        use_output_bias: Whether the output projection has a bias. `None` for
            `use_bias`, which then is about the others only.
        rotary_embedding: A layer called as `rotary(x, positions=positions)` on
            `(B, T, heads, H)`, applied to queries, and to keys before they are
            cached. `keras_kvcache.layers.RotaryEmbedding` is one.
        query_norm, key_norm: Layers applied to queries and keys `(B, T, heads,
            H)` before rotation, such as `keras.layers.RMSNormalization()`.
        query_scale: Factor of the scores. `None` for `H ** -0.5`.
        logit_soft_cap: If given, scores become `cap · tanh(scores / cap)`.
        score_bias: An integer for a weight `score_bias_table (N, score_bias)`, zeros at
            first, whose entry `d` is added to the score of a slot `d` positions back,
            the last entry farther back, as in T5's decoder. Or `"alibi"`, or a
            serializable function or layer, called as `keras_kvcache.attention.Scoring`
            has it; kernels take neither.
        use_sink_logits: Whether heads have weights `sink_logits (N,)`, zeros at first,
            which share in the softmax and add no value, as in gpt-oss.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        query: `(B, T, D)`.
        value: `(B, T', D)`. Without a cache `T'` is the length attended; with an
            index it is how many entries are written.
        key: `(B, T', D)`; `None` for `value`.
        attention_mask: Boolean or 0/1, `(T, S)`, `(B, T, S)` or `(B, N, T, S)`,
            sizes of 1 broadcast; `S` are positions, in most caches the slots. It
            takes the place of the default by which, with an index, slots at or past
            `index + T'` are not attended.
        cache: The dense tensor `(B, 2, S, K, H)`, keys at 0 and values at 1 of
            axis 1, or a cache object of `keras_kvcache.caches`. What is returned
            is of the same kind and dtype; the layer's own dtype doesn't matter.
        cache_update_index: Slot of the first new entry, which is also its
            position: an int, a scalar tensor, or one per row, `(B,)`.
        return_attention_scores: Whether to return the attention weights
            `(B, N, T, S)` too.
        training: Whether dropout is active.
        use_causal_mask: Whether to hide later positions. Without an index,
            queries stand at 0, 1, 2, …; with one, at index, index + 1, …
        query_mask, value_mask, key_mask: Boolean `(B, T)` and `(B, T')` masks,
            which Keras fills in from masks that the inputs carry. With a cache
            they hide what is written in this very call.

    Returns:
        `output`, `(output, scores)`, `(output, cache)` or `(output, scores,
        cache)`, with `output` of shape `(B, T, D)`. A query with nothing to
        attend gives zeros before the output projection.

    Raises:
        ValueError: A shape, an index or an argument doesn't fit; the message
            names it. An index that is traced can't be checked: entries past the
            end are then dropped, and every stored entry stays as it was.
        TypeError: An index that isn't an integer, a cache that doesn't hold
            floats.
    """

    def __init__(
        self,
        num_heads: int,
        key_dim: int,
        *args: Any,
        num_key_value_heads: int | None = None,
        use_output_bias: bool | None = None,
        rotary_embedding: keras.layers.Layer | None = None,
        query_norm: keras.layers.Layer | None = None,
        key_norm: keras.layers.Layer | None = None,
        query_scale: float | None = None,
        logit_soft_cap: float | None = None,
        score_bias: int | str | Callable | None = None,
        use_sink_logits: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_heads, key_dim, *args, **kwargs)
        # Keras would cast the cache, too. Sublayers cast their inputs by themselves.
        self.autocast = False
        heads = num_heads if num_key_value_heads is None else num_key_value_heads
        self.num_key_value_heads = heads
        has_bias = self._use_bias if use_output_bias is None else use_output_bias
        self.use_output_bias = has_bias
        self.rotary_embedding = rotary_embedding
        self.query_norm = query_norm
        self.key_norm = key_norm
        self.query_scale = query_scale
        self.logit_soft_cap = logit_soft_cap
        self.score_bias = score_bias
        self.use_sink_logits = use_sink_logits
        self.score_bias_table = self.sink_logits = None
        checks.check_constructor(self)
        if query_scale is not None:
            self._inverse_sqrt_key_dim = float(query_scale)

    def build(
        self, query_shape: Any, value_shape: Any = None, key_shape: Any = None
    ) -> None:
        """Creates the projections.

        Args:
            query_shape: `(B, T, D)`.
            value_shape: `(B, T', D)`.
            key_shape: `(B, T', D)`; `None` for `value_shape`.
        """
        if value_shape is None:
            raise ValueError(
                "`value` may be `None` only in a layer that is built, as the "
                "projections of it follow from its shape. Received: value_shape=None"
            )
        key_shape = value_shape if key_shape is None else key_shape
        if tuple(value_shape[1:-1]) != tuple(key_shape[1:-1]):
            raise ValueError(
                "`value` and `key` may differ in their last axis only. Received: "
                f"value_shape={value_shape}, key_shape={key_shape}"
            )
        heads, group_heads = self._num_heads, self.num_key_value_heads
        self._query_dense = self._projection("query", query_shape, heads, self._key_dim)
        self._key_dense = self._projection("key", key_shape, group_heads, self._key_dim)
        if self._use_gate:
            self._gate_dense = self._projection(
                "gate", query_shape, heads, self._value_dim, activation="sigmoid"
            )
        self._value_dense = self._projection(
            "value", value_shape, group_heads, self._value_dim
        )
        self._build_attention(len(query_shape) + 1)
        build_scoring(self)
        make = functools.partial(make_output_projection, self, query_shape)
        shape = (*query_shape[:-1], heads, self._value_dim)
        self._output_dense = self._part("output_dense", make, shape)
        for layer, shape, layer_heads in (
            (self.query_norm, query_shape, heads),
            (self.key_norm, key_shape, group_heads),
            (self.rotary_embedding, query_shape, heads),
        ):
            if layer is not None and not layer.built:
                layer.build((*shape[:-1], layer_heads, self._key_dim))

    def cache_spec(
        self,
        batch_size: int,
        capacity: int,
        codec: Any = None,
        kind: Any = "auto",
        layout: str = "head_major",
    ) -> CacheSpec:
        """A `CacheSpec` for this layer; arguments as of `attention_cache_spec`."""
        return attention_cache_spec(self, batch_size, capacity, codec, kind, layout)

    def _projection(self, name, shape, *sizes, **options):
        make = functools.partial(make_projection, self, name, shape, *sizes, **options)
        return self._part(f"{name}_dense", make, shape)

    def call(
        self,
        query: Any,
        value: Any,
        key: Any = None,
        attention_mask: Any = None,
        cache: Any = None,
        cache_update_index: Any = None,
        return_attention_scores: bool = False,
        training: bool | None = None,
        use_causal_mask: bool = False,
        query_mask: Any = None,
        value_mask: Any = None,
        key_mask: Any = None,
    ) -> Any:
        """Attends, in one of the three modes; arguments and result as in the class."""
        if attention_mask is not None:
            attention_mask = ops.convert_to_tensor(attention_mask)
        if cache is not None and cache_update_index is None:
            value_mask = key_mask = None  # ignored with what they are masks of
        masks = dict(
            attention_mask=attention_mask,
            query_mask=query_mask,
            value_mask=value_mask,
            key_mask=key_mask,
        )
        if not self._attends_one_axis(query):
            checks.check_multi_axis_call(self, cache, cache_update_index)
            return super().call(
                query,
                value,
                key=key,
                return_attention_scores=return_attention_scores,
                training=training,
                use_causal_mask=use_causal_mask,
                **masks,
            )
        cache_object, index = checks.read_call(
            self,
            query,
            value,
            key,
            cache,
            cache_update_index,
            return_attention_scores,
            **masks,
        )
        query, value, key = checks.without_masks(
            (query, value, key), (query_mask, value_mask, key_mask)
        )

        queries = self._project_query(query, index)
        entries = None
        if cache is None or cache_update_index is not None:
            entries = self.project_entries(value, key, index)
        inputs = (queries, entries, index)

        if attention_mask is not None:
            attention_mask = align_mask(attention_mask)
        hiding = dict(
            masks=dict(
                attention_mask=attention_mask,
                query_mask=query_mask,
                entry_masks=[m for m in (value_mask, key_mask) if m is not None],
            ),
            causal=bool(use_causal_mask),
            sliding_window=self._sliding_window,
        )
        scoring, scores = scoring_of(self), None
        if return_attention_scores or (self._dropout > 0 and training):
            cache_object, view, hidden = update_and_mask(
                cache_object, *inputs, **hiding
            )
            positions = query_positions(queries, index, scoring)
            dropout = functools.partial(self._dropout_layer, training=training)
            output, scores = attend_with_scores(
                queries, view, hidden, scoring, positions, dropout
            )
        elif cache is None and self._has_kernel():
            output = attend_sequence(
                queries, *entries, scoring.scale, self._flash_attention, **hiding
            )
        else:
            output, cache_object = cached_attention(
                cache_object, *inputs, scoring, **hiding
            )

        output = ops.cast(output, self.compute_dtype)
        if self._use_gate:
            output = output * project(self._gate_dense, query)
        output = project(self._output_dense, output, feature_axes=2)
        if not return_attention_scores:
            scores = None
        return results(output, scores, cache, cache_object)

    def _project_query(self, query, index):
        """`(B, T, D)` to queries `(B, T, N, H)`, normed and rotated."""
        queries = project(self._query_dense, query)
        if self.query_norm is not None:
            queries = self.query_norm(queries)
        return self._rotate(queries, index)

    def project_entries(self, value: Any, key: Any, index: Any) -> tuple[Any, Any]:
        """`(B, T', D)` each to the `(B, T', K, H)` keys and values that are cached."""
        keys = project(self._key_dense, value if key is None else key)
        if self.key_norm is not None:
            keys = self.key_norm(keys)
        return self._rotate(keys, index), project(self._value_dense, value)

    def _rotate(self, inputs, index):
        if self.rotary_embedding is not None:
            positions = token_positions(index, ops.shape(inputs)[1])
            inputs = self.rotary_embedding(inputs, positions=positions)
        # Norm and rotation are the user's layers, perhaps of another dtype.
        return ops.cast(inputs, self.compute_dtype)

    def _has_kernel(self):
        """Whether Keras' fused attention computes what the layer is to compute."""
        # JAX's wants one head size, and its softmax is float32 for every dtype.
        suits = self._key_dim == self._value_dim and self.compute_dtype != "float64"
        # Where flash attention is asked for, Keras' own error shall say so.
        return (suits or self._flash_attention) and not asked_of_scores(self)

    def _attends_one_axis(self, query):
        return self._attention_axes == (1,) and len(query.shape) == 3

    def compute_output_spec(
        self,
        query: Any,
        value: Any,
        key: Any = None,
        attention_mask: Any = None,
        cache: Any = None,
        cache_update_index: Any = None,
        return_attention_scores: bool = False,
        training: bool | None = None,
        use_causal_mask: bool = False,
        **masks: Any,
    ) -> Any:
        """Shapes and dtypes of what a call returns."""
        if not self._attends_one_axis(query):
            checks.check_multi_axis_call(self, cache, cache_update_index)
            return super().compute_output_spec(
                query, value, key, return_attention_scores=return_attention_scores
            )
        checks.read_call(
            self,
            query,
            value,
            key,
            cache,
            cache_update_index,
            return_attention_scores,
            attention_mask,
            **masks,
        )
        return output_spec(self, query, value, cache, return_attention_scores)

    def get_config(self) -> dict[str, Any]:
        """Constructor arguments."""
        serialize = keras.saving.serialize_keras_object
        layers = {name: getattr(self, name) for name in checks.LAYER_ARGUMENTS}
        bias = self.score_bias
        return {
            **super().get_config(),
            "flash_attention": self._flash_attention,
            "num_key_value_heads": self.num_key_value_heads,
            "use_output_bias": self.use_output_bias,
            "query_scale": self.query_scale,
            "logit_soft_cap": self.logit_soft_cap,
            "score_bias": serialize(bias) if callable(bias) else bias,
            "use_sink_logits": self.use_sink_logits,
            **{name: layer and serialize(layer) for name, layer in layers.items()},
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "CachedMultiHeadAttention":
        """The layer that `get_config` describes."""
        config = dict(config)
        for name in (*checks.LAYER_ARGUMENTS, "score_bias"):
            if isinstance(config.get(name), dict):
                config[name] = keras.saving.deserialize_keras_object(config[name])
        return cls(**config)
